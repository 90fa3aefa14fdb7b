//! Tensors of a safetensors file, of whatever number type, as plain vectors.

use std::path::Path;

use half::{bf16, f16};
use safetensors::tensor::{Metadata, TensorView};
use safetensors::{Dtype, SafeTensors};

use crate::{Error, Result};

/// The header and the tensors of a file's bytes. Fails on bytes that are not a whole safetensors file.
pub fn parse<'a>(path: &Path, bytes: &'a [u8]) -> Result<(Metadata, SafeTensors<'a>)> {
    let error = |source| Error::Format { path: path.to_owned(), source };
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(error)?;
    let tensors = SafeTensors::deserialize(bytes).map_err(error)?;
    Ok((metadata, tensors))
}

/// A tensor by name; `expected` says what it should be if it is missing.
pub fn view<'a>(
    path: &Path,
    tensors: &SafeTensors<'a>,
    name: &str,
    expected: &str,
) -> Result<TensorView<'a>> {
    tensors.tensor(name).map_err(|_| Error::Tensor {
        path: path.to_owned(),
        tensor: name.to_owned(),
        expected: expected.to_owned(),
        found: "missing".to_owned(),
    })
}

/// A tensor that is there, but is not what was expected.
pub fn tensor_error(path: &Path, name: &str, expected: &str, found: &TensorView) -> Error {
    Error::Tensor {
        path: path.to_owned(),
        tensor: name.to_owned(),
        expected: expected.to_owned(),
        found: format!("{} {:?}", found.dtype(), found.shape()),
    }
}

/// The values of a tensor of F64, F32, F16, BF16 or I8 (the integers themselves); none for another
/// type.
pub fn floats(tensor: &TensorView) -> Option<Vec<f32>> {
    let data = tensor.data();
    match tensor.dtype() {
        Dtype::F64 => Some(map(data, |bytes| f64::from_le_bytes(bytes) as f32)),
        Dtype::F32 => Some(map(data, f32::from_le_bytes)),
        Dtype::F16 => Some(map(data, |bytes| f16::from_le_bytes(bytes).to_f32())),
        Dtype::BF16 => Some(map(data, |bytes| bf16::from_le_bytes(bytes).to_f32())),
        Dtype::I8 => Some(map(data, |bytes| f32::from(i8::from_le_bytes(bytes)))),
        _ => None,
    }
}

/// The values of a tensor of I64 or I32; none for another type.
pub fn integers(tensor: &TensorView) -> Option<Vec<i64>> {
    let data = tensor.data();
    match tensor.dtype() {
        Dtype::I64 => Some(map(data, i64::from_le_bytes)),
        Dtype::I32 => Some(map(data, |bytes| i64::from(i32::from_le_bytes(bytes)))),
        _ => None,
    }
}

fn map<T, const N: usize>(data: &[u8], read: impl Fn([u8; N]) -> T) -> Vec<T> {
    let (values, _) = data.as_chunks::<N>();
    values.iter().map(|&bytes| read(bytes)).collect()
}
