//! Stores that lie about conditional writes are refused when a bank is opened.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::{BoxStream, StreamExt};
use memory_bank::{Access, BankStore, StoreOptions};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    ObjectStoreExt, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};

use crate::shards::{in_memory, open};
use crate::support::run;

#[derive(Copy, Clone, Debug)]
enum Lie {
    /// A create of what is there overwrites it, as Garage does.
    Overwrites,
    /// Several creates at once all win, as with s3s-fs: it looks, and then it writes.
    Races,
    /// An update by any tag is done.
    Updates,
    /// It knows no updates, which is no lie: a local file system.
    KnowsNoUpdates,
}

#[derive(Debug)]
struct Liar {
    inner: InMemory,
    lie: Lie,
}

impl fmt::Display for Liar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Liar")
    }
}

#[async_trait]
impl ObjectStore for Liar {
    async fn put_opts(&self, path: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        match (self.lie, &options.mode) {
            (Lie::Overwrites, PutMode::Create) | (Lie::Updates, PutMode::Update(_)) => {
                self.inner.put(path, payload).await
            }
            (Lie::Races, PutMode::Create) => {
                if self.inner.head(path).await.is_ok() {
                    let source = "it is there".into();
                    return Err(Error::AlreadyExists { path: path.to_string(), source });
                }
                tokio::task::yield_now().await;
                self.inner.put(path, payload).await
            }
            (Lie::KnowsNoUpdates, PutMode::Update(_)) => {
                Err(Error::NotImplemented { operation: "update".to_owned(), implementer: self.to_string() })
            }
            _ => self.inner.put_opts(path, payload, options).await,
        }
    }

    async fn put_multipart_opts(
        &self,
        path: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(path, options).await
    }

    async fn get_opts(&self, path: &Path, options: GetOptions) -> Result<GetResult> {
        self.inner.get_opts(path, options).await
    }

    async fn get_ranges(&self, path: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        self.inner.get_ranges(path, ranges).await
    }

    fn delete_stream(&self, paths: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(paths)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

async fn open_liar(lie: Lie, access: Access) -> memory_bank::Result<BankStore> {
    let store = Arc::new(Liar { inner: InMemory::new(), lie });
    let options = StoreOptions { access, ..StoreOptions::default() };
    BankStore::open(store, &Path::from("banks"), "facts", options).await
}

#[test]
fn a_store_that_lies_is_refused_by_name_of_the_lie() {
    run(async {
        for (lie, text) in [
            (Lie::Overwrites, "the store created a file that was there already, expected it to refuse it"),
            (Lie::Races, "create one file, expected it to have one winner"),
            (
                Lie::Updates,
                "the store updated a file by the tag of its older content, expected it to refuse it",
            ),
        ] {
            let error = open_liar(lie, Access::Write).await.unwrap_err().to_string();
            assert!(error.starts_with("Liar/banks/facts") && error.contains(text), "{error}");
            // Who only reads needs nothing of the kind.
            open_liar(lie, Access::Read).await.unwrap();
        }
        open_liar(Lie::KnowsNoUpdates, Access::Write).await.unwrap();
    });
}

#[test]
fn a_probe_leaves_nothing() {
    let root = tempfile::tempdir().unwrap();
    run(async {
        let store = in_memory();
        open(&store, StoreOptions::default()).await;
        assert_eq!(store.list(None).count().await, 0);
        let url = format!("file://{}", root.path().display());
        BankStore::open_url(&url, &[], "facts", StoreOptions::default()).await.unwrap();
        assert_eq!(std::fs::read_dir(root.path().join("facts")).unwrap().count(), 0);
    });
}

#[test]
fn a_bank_is_a_plain_name_below_its_root() {
    let root = tempfile::tempdir().unwrap();
    run(async {
        let url = root.path().to_str().unwrap();
        let long = "x".repeat(65);
        for name in ["", ".", "..", "a/b", "/a", "Facts", "a b", "ä", "a\0", long.as_str()] {
            let opened = BankStore::open_url(url, &[], name, StoreOptions::default()).await;
            let text = opened.unwrap_err().to_string();
            assert!(text.starts_with("bank is ") && text.contains("expected 1 to 64 of"), "{text}");
        }
        let elsewhere = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(elsewhere.path(), root.path().join("link")).unwrap();
        let text =
            BankStore::open_url(url, &[], "link", StoreOptions::default()).await.unwrap_err().to_string();
        assert!(text.ends_with("/link: kind is a symbolic link, expected a folder"), "{text}");
        assert_eq!(std::fs::read_dir(elsewhere.path()).unwrap().count(), 0);

        BankStore::open_url(url, &[], "facts", StoreOptions::default()).await.unwrap();
        std::os::unix::fs::symlink(elsewhere.path(), root.path().join("facts/00000001")).unwrap();
        let text =
            BankStore::open_url(url, &[], "facts", StoreOptions::default()).await.unwrap_err().to_string();
        assert!(text.ends_with("/facts/00000001: kind is a symbolic link, expected a folder"), "{text}");
    });
}
