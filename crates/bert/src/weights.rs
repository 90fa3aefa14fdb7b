//! The tensors of a model file, by the names that transformers gives them.

use std::path::{Path, PathBuf};

use embed::table::{floats, parse, tensor_error, view};
use safetensors::{Dtype, SafeTensors};

use crate::Result;

/// Before every name in files of models that were saved with a head on top.
const PREFIX: &str = "bert.";

/// An open model file.
pub(crate) struct Weights<'a> {
    path: PathBuf,
    tensors: SafeTensors<'a>,
    has_prefix: bool,
}

impl<'a> Weights<'a> {
    pub(crate) fn new(path: &Path, bytes: &'a [u8]) -> Result<Self> {
        let (_, tensors) = parse(path, bytes)?;
        let has_prefix = tensors.iter().any(|(name, _)| name.starts_with(PREFIX));
        Ok(Self { path: path.to_owned(), tensors, has_prefix })
    }

    /// The values of a tensor of F32, F16 or BF16 with that shape.
    pub(crate) fn get(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let name = format!("{}{name}", if self.has_prefix { PREFIX } else { "" });
        let expected = format!("F32, F16 or BF16 {shape:?}");
        let tensor = view(&self.path, &self.tensors, &name, &expected)?;
        let is_float = matches!(tensor.dtype(), Dtype::F32 | Dtype::F16 | Dtype::BF16);
        let values = floats(&tensor).filter(|_| is_float && tensor.shape() == shape);
        Ok(values.ok_or_else(|| tensor_error(&self.path, &name, &expected, &tensor))?)
    }
}
