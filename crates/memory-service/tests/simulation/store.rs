//! A store whose answers take time, so that a process crashes in the middle of a save or a restore.

use std::fmt;
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use tokio::time::sleep;

#[derive(Debug)]
pub(crate) struct SlowStore {
    pub(crate) inner: InMemory,
    /// Before everything, and after it was done but before the caller knows.
    pub(crate) pause: Duration,
}

impl fmt::Display for SlowStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("slow")
    }
}

impl SlowStore {
    async fn slowly<T>(&self, work: impl Future<Output = T>) -> T {
        sleep(self.pause).await;
        let done = work.await;
        sleep(self.pause).await;
        done
    }
}

#[async_trait]
impl ObjectStore for SlowStore {
    async fn put_opts(&self, path: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        let put = self.inner.put_opts(path, payload, options);
        // While a file of blocks is written, a thread for blocking work waits for the rest of it to hash,
        // and tokio's clock does not move.
        if path.as_ref().ends_with(".safetensors") { put.await } else { self.slowly(put).await }
    }

    async fn put_multipart_opts(
        &self,
        path: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(path, options).await
    }

    async fn get_opts(&self, path: &Path, options: GetOptions) -> Result<GetResult> {
        self.slowly(self.inner.get_opts(path, options)).await
    }

    fn delete_stream(&self, paths: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let pause = self.pause;
        self.inner.delete_stream(
            paths
                .then(move |path| async move {
                    sleep(pause).await;
                    path
                })
                .boxed(),
        )
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let (listed, pause) = (self.inner.list(prefix), self.pause);
        stream::once(async move {
            sleep(pause).await;
            listed
        })
        .flatten()
        .boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}
