//! Object stores that break, and some that lie.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::{BoxStream, StreamExt};
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, UploadPart,
};

/// What goes wrong with the operation whose turn it is.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) enum Fault {
    /// It is not done, nor is anything after it.
    Kill,
    /// It is done, its answer is lost, and nothing is done after it.
    LoseAnswer,
    /// Of what it writes, half is written, and nothing is done after it.
    Tear,
    /// Of what it writes, half is written, and the store says that all is well.
    Shorten,
    /// There is no space for what it writes, nor for anything after it.
    Full,
}

pub(crate) const FAULTS: [Fault; 5] =
    [Fault::Kill, Fault::LoseAnswer, Fault::Tear, Fault::Shorten, Fault::Full];

/// A store of which one operation goes wrong.
#[derive(Debug)]
pub(crate) struct Faulty {
    inner: Arc<dyn ObjectStore>,
    state: Arc<State>,
}

#[derive(Debug)]
struct State {
    fault: Fault,
    /// Operations until the fault; none is counted before [`Faulty::arm`].
    left: AtomicI64,
}

/// What becomes of one operation.
#[derive(Copy, Clone, PartialEq, Eq)]
enum Fate {
    Done,
    Half,
    DoneUnsaid,
    HalfUnsaid,
    Failed,
}

const UNARMED: i64 = i64::MAX / 2;

impl Faulty {
    pub(crate) fn new(inner: Arc<dyn ObjectStore>, fault: Fault) -> Self {
        Self { inner, state: Arc::new(State { fault, left: AtomicI64::new(UNARMED) }) }
    }

    /// The operation `k`, from 0, goes wrong.
    pub(crate) fn arm(&self, k: i64) {
        self.state.left.store(k, Ordering::SeqCst);
    }

    /// Whether it has come to that.
    pub(crate) fn has_struck(&self) -> bool {
        self.state.left.load(Ordering::SeqCst) < 0
    }
}

impl State {
    fn next(&self, writes: bool) -> Fate {
        let left = self.left.fetch_sub(1, Ordering::SeqCst);
        match (self.fault, left.cmp(&0)) {
            (_, std::cmp::Ordering::Greater) => Fate::Done,
            (Fault::LoseAnswer, std::cmp::Ordering::Equal) => Fate::DoneUnsaid,
            (Fault::Tear, std::cmp::Ordering::Equal) if writes => Fate::HalfUnsaid,
            (Fault::Shorten, std::cmp::Ordering::Equal) if writes => Fate::Half,
            (Fault::Shorten, _) => Fate::Done,
            (Fault::Full, _) if !writes => Fate::Done,
            _ => Fate::Failed,
        }
    }

    fn error(&self) -> Error {
        let kind = match self.fault {
            Fault::Full => std::io::ErrorKind::StorageFull,
            _ => std::io::ErrorKind::BrokenPipe,
        };
        Error::Generic { store: "Faulty", source: Box::new(std::io::Error::from(kind)) }
    }

    /// The payload that arrives; `None` if nothing does.
    fn arriving(&self, fate: Fate, payload: PutPayload) -> Option<PutPayload> {
        match fate {
            Fate::Done | Fate::DoneUnsaid => Some(payload),
            Fate::Half | Fate::HalfUnsaid => {
                let bytes = Bytes::from(payload);
                Some(bytes.slice(..bytes.len() / 2).into())
            }
            Fate::Failed => None,
        }
    }

    fn answer<T>(&self, fate: Fate, answer: Result<T>) -> Result<T> {
        match fate {
            Fate::Done | Fate::Half => answer,
            Fate::DoneUnsaid | Fate::HalfUnsaid | Fate::Failed => Err(self.error()),
        }
    }
}

impl fmt::Display for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Faulty")
    }
}

#[async_trait]
impl ObjectStore for Faulty {
    async fn put_opts(&self, path: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        let fate = self.state.next(true);
        match self.state.arriving(fate, payload) {
            Some(payload) => self.state.answer(fate, self.inner.put_opts(path, payload, options).await),
            None => Err(self.state.error()),
        }
    }

    async fn put_multipart_opts(
        &self,
        path: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        let fate = self.state.next(true);
        if fate == Fate::Failed {
            return Err(self.state.error());
        }
        let upload = self.inner.put_multipart_opts(path, options).await?;
        let upload = FaultyUpload { upload, state: Arc::clone(&self.state) };
        self.state.answer(fate, Ok(Box::new(upload) as Box<dyn MultipartUpload>))
    }

    async fn get_opts(&self, path: &Path, options: GetOptions) -> Result<GetResult> {
        let fate = self.state.next(false);
        self.state.answer(fate, self.inner.get_opts(path, options).await)
    }

    async fn get_ranges(&self, path: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        let fate = self.state.next(false);
        self.state.answer(fate, self.inner.get_ranges(path, ranges).await)
    }

    fn delete_stream(&self, paths: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let (state, inner) = (Arc::clone(&self.state), Arc::clone(&self.inner));
        let delete = move |path: Result<Path>| {
            let (state, inner) = (Arc::clone(&state), Arc::clone(&inner));
            async move {
                match state.next(false) {
                    Fate::Failed => Err(state.error()),
                    fate => {
                        let one = futures::stream::once(async move { path }).boxed();
                        let deleted = inner.delete_stream(one).next().await;
                        state.answer(fate, deleted.expect("one answer for one path"))
                    }
                }
            }
        };
        paths.then(delete).boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        match self.state.next(false) {
            Fate::Done => self.inner.list(prefix),
            _ => futures::stream::iter([Err(self.state.error())]).boxed(),
        }
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let fate = self.state.next(false);
        self.state.answer(fate, self.inner.list_with_delimiter(prefix).await)
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

#[derive(Debug)]
struct FaultyUpload {
    upload: Box<dyn MultipartUpload>,
    state: Arc<State>,
}

#[async_trait]
impl MultipartUpload for FaultyUpload {
    fn put_part(&mut self, payload: PutPayload) -> UploadPart {
        let (fate, state) = (self.state.next(true), Arc::clone(&self.state));
        match state.arriving(fate, payload) {
            Some(payload) => {
                let part = self.upload.put_part(payload);
                Box::pin(async move { state.answer(fate, part.await) })
            }
            None => Box::pin(async move { Err(state.error()) }),
        }
    }

    async fn complete(&mut self) -> Result<PutResult> {
        match self.state.next(true) {
            Fate::Failed | Fate::HalfUnsaid => Err(self.state.error()),
            fate => {
                let answer = self.upload.complete().await;
                self.state.answer(fate, answer)
            }
        }
    }

    async fn abort(&mut self) -> Result<()> {
        match self.state.next(false) {
            Fate::Failed => Err(self.state.error()),
            _ => self.upload.abort().await,
        }
    }
}
