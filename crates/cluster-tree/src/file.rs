use std::fs;
use std::io::{self, Write};
use std::path::Path;

use safetensors::{Dtype, SafeTensors};

use crate::{ClusterTree, Error, Level, Result};

/// The `format` that a tree file's metadata carries.
pub const FORMAT: &str = "anchorage.tree.v1";

impl ClusterTree {
    /// Writes a safetensors file: for each level `level0.centroids` (`[N, D]` f32) and
    /// `level0.counts` (`[N]` U64), and in the metadata `format` and the branchings. The file
    /// appears complete or not at all, and the same tree gives the same bytes.
    pub fn save(&self, path: &Path) -> Result<()> {
        atomic_file::write_with(path, |file| write_to(self, file))
            .map_err(|source| Error::Io { path: path.to_owned(), source })
    }

    /// Reads what [`ClusterTree::save`] wrote. Fails on a file that is cut short, on a tensor that
    /// is missing or of another type or shape, and on arrays that do not make a tree.
    pub fn load(path: &Path) -> Result<Self> {
        let bytes = fs::read(path).map_err(|source| Error::Io { path: path.to_owned(), source })?;
        let format_error = |source| Error::Format { path: path.to_owned(), source };
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(format_error)?;
        let tensors = SafeTensors::deserialize(&bytes).map_err(format_error)?;
        let metadata = |key| header.metadata().as_ref().and_then(|map| map.get(key)).map(String::as_str);
        let metadata_error = |key, expected: &str, found: Option<&str>| Error::Metadata {
            path: path.to_owned(),
            key,
            expected: expected.to_owned(),
            found: found.map_or("missing".to_owned(), |text| format!("{text:?}")),
        };
        let format = metadata("format");
        if format != Some(FORMAT) {
            return Err(metadata_error("format", FORMAT, format));
        }
        let text = metadata("branching");
        let branching = text
            .and_then(|text| text.split(',').map(|part| part.parse().ok()).collect::<Option<Vec<usize>>>())
            .ok_or_else(|| metadata_error("branching", "comma-separated numbers", text))?;
        let reader = Reader { path, tensors };
        let dim = reader.dim()?;
        let content_error = |source| Error::Content { path: path.to_owned(), source: Box::new(source) };
        ClusterTree::new(dim, reader.levels(dim, &branching)?).map_err(content_error)
    }
}

struct Reader<'a> {
    path: &'a Path,
    tensors: SafeTensors<'a>,
}

impl Reader<'_> {
    /// The dimension, from the shape of the first level's centroids.
    fn dim(&self) -> Result<usize> {
        let name = "level0.centroids";
        let view = self.tensors.tensor(name).map_err(|_| self.error(name, "F32 [N, D]", "missing"))?;
        match view.shape() {
            &[_, dim] => Ok(dim),
            shape => Err(self.error(name, "F32 [N, D]", &format!("{} {shape:?}", view.dtype()))),
        }
    }

    fn levels(&self, dim: usize, branching: &[usize]) -> Result<Vec<Level>> {
        let mut n_clusters = 1usize;
        let mut levels = Vec::with_capacity(branching.len());
        for (level, &branching) in branching.iter().enumerate() {
            // A product that does not fit matches no shape, so the shape is what gets reported.
            n_clusters = n_clusters.saturating_mul(branching);
            let (name, shape) = (format!("level{level}.centroids"), [n_clusters, dim]);
            let centroids = self.values(&name, Dtype::F32, &shape, f32::from_le_bytes)?;
            let name = format!("level{level}.counts");
            let counts = self.values(&name, Dtype::U64, &[n_clusters], u64::from_le_bytes)?;
            levels.push(Level { branching, centroids, counts });
        }
        Ok(levels)
    }

    fn values<T, const N: usize>(
        &self,
        name: &str,
        dtype: Dtype,
        shape: &[usize],
        from_bytes: impl Fn([u8; N]) -> T,
    ) -> Result<Vec<T>> {
        let expected = format!("{dtype} {shape:?}");
        let view = self.tensors.tensor(name).map_err(|_| self.error(name, &expected, "missing"))?;
        if view.dtype() != dtype || view.shape() != shape {
            return Err(self.error(name, &expected, &format!("{} {:?}", view.dtype(), view.shape())));
        }
        Ok(view.data().as_chunks::<N>().0.iter().map(|&bytes| from_bytes(bytes)).collect())
    }

    fn error(&self, tensor: &str, expected: &str, found: &str) -> Error {
        let (expected, found) = (expected.to_owned(), found.to_owned());
        Error::Tensor { path: self.path.to_owned(), tensor: tensor.to_owned(), expected, found }
    }
}

fn write_to(tree: &ClusterTree, file: &mut impl Write) -> io::Result<()> {
    let header = header(tree);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    for level in tree.levels() {
        level.counts.iter().try_for_each(|count| file.write_all(&count.to_le_bytes()))?;
    }
    for level in tree.levels() {
        level.centroids.iter().try_for_each(|value| file.write_all(&value.to_le_bytes()))?;
    }
    Ok(())
}

/// The safetensors header, written here because the library writes metadata in the random order of
/// a hash map. Counts come first, so that every tensor starts aligned to its type.
fn header(tree: &ClusterTree) -> String {
    let branching: Vec<String> = tree.levels().iter().map(|level| level.branching.to_string()).collect();
    let mut header =
        format!("{{\"__metadata__\":{{\"format\":\"{FORMAT}\",\"branching\":\"{}\"}}", branching.join(","));
    let mut start = 0;
    let mut tensor = |level: usize, name: &str, dtype: &str, shape: &[usize], bytes: usize| {
        let end = start + bytes;
        let entry = format!(
            ",\"level{level}.{name}\":{{\"dtype\":\"{dtype}\",\"shape\":{shape:?},\"data_offsets\":[{start},{end}]}}"
        );
        start = end;
        header.push_str(&entry);
    };
    for (level, Level { counts, .. }) in tree.levels().iter().enumerate() {
        tensor(level, "counts", "U64", &[counts.len()], counts.len() * 8);
    }
    for (level, Level { counts, centroids, .. }) in tree.levels().iter().enumerate() {
        tensor(level, "centroids", "F32", &[counts.len(), tree.dim()], centroids.len() * 4);
    }
    header.push('}');
    // The 8 bytes of the length, the header and its padding end on a multiple of 64.
    let padded = (header.len() + 8).next_multiple_of(64) - 8;
    format!("{header:padded$}")
}
