//! A fitted [`Hashed`] as a safetensors file.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::Path;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};

use super::{Hashed, HashedOptions, N_BUCKETS};
use crate::table::{parse, tensor_error, view};
use crate::{Error, Result};

/// The metadata key that holds the header as JSON. One key, not several: safetensors writes them in
/// no fixed order, and the same embedder should give the same bytes.
pub(super) const FORMAT: &str = "anchorage.hashed.v1";

const TENSOR: &str = "idf";

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    options: HashedOptions,
    n_texts: u64,
}

impl Hashed {
    /// Writes the table and the options: the tensor `idf` (`[262144]` f32), and a JSON header in the
    /// metadata. The file appears complete or not at all, and the same embedder gives the same bytes.
    pub fn save(&self, path: &Path) -> Result<()> {
        let header = Header { options: self.options, n_texts: self.n_texts };
        let header = serde_json::to_string(&header).map_err(io::Error::from).map_err(Error::io(path))?;
        let metadata = HashMap::from([(FORMAT.to_owned(), header)]);
        let bytes: Vec<u8> = self.idf.iter().flat_map(|value| value.to_le_bytes()).collect();
        let format_error = |source| Error::Format { path: path.to_owned(), source };
        let tensor = TensorView::new(Dtype::F32, vec![N_BUCKETS], &bytes).map_err(format_error)?;
        let file = safetensors::serialize([(TENSOR, tensor)], Some(metadata)).map_err(format_error)?;
        atomic_file::write(path, &file).map_err(Error::io(path))
    }

    /// Reads what [`Hashed::save`] wrote; the embedder then gives the same bits. Fails on a file
    /// that is cut short or of another format, on an option out of range, and on a table of another
    /// type or shape or with a value that no frequency gives.
    pub fn load(path: &Path) -> Result<Self> {
        let bytes = fs::read(path).map_err(Error::io(path))?;
        let (metadata, tensors) = parse(path, &bytes)?;
        let metadata_error = |expected: &str, found: String| Error::Metadata {
            path: path.to_owned(),
            key: FORMAT,
            expected: expected.to_owned(),
            found,
        };
        let header = metadata.metadata().as_ref().and_then(|map| map.get(FORMAT));
        let header = header.ok_or_else(|| metadata_error("a JSON header", "missing".to_owned()))?;
        let Header { options, n_texts } = serde_json::from_str(header)
            .map_err(|error| metadata_error("options and n_texts as JSON", format!("{header} ({error})")))?;
        options.check().map_err(|error| metadata_error("options in range", error.to_string()))?;
        Ok(Self::new(options, n_texts, table(path, &tensors)?))
    }
}

fn table(path: &Path, tensors: &SafeTensors) -> Result<Vec<f32>> {
    let expected = format!("F32 [{N_BUCKETS}]");
    let tensor = view(path, tensors, TENSOR, &expected)?;
    if tensor.dtype() != Dtype::F32 || tensor.shape() != [N_BUCKETS] {
        return Err(tensor_error(path, TENSOR, &expected, &tensor));
    }
    let (values, _) = tensor.data().as_chunks::<4>();
    let table: Vec<f32> = values.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
    match table.iter().position(|value| !value.is_finite() || *value <= 0.0) {
        None => Ok(table),
        Some(row) => Err(Error::Value {
            path: path.to_owned(),
            tensor: TENSOR.to_owned(),
            row,
            expected: "a finite positive number".to_owned(),
            found: table[row].to_string(),
        }),
    }
}
