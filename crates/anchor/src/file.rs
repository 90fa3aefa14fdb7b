//! anchor.safetensors: every parameter under its name, the configuration in the metadata.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use safetensors::tensor::{Dtype, SafeTensors};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::{Anchor, AnchorConfig, Error, Result};

/// The one metadata key. Its value is JSON with `format` and `config`: two keys would be written in the
/// random order of a hash map, and the same weights must make the same bytes.
const KEY: &str = "anchor";

/// Value of `format`.
const FORMAT: &str = "anchorage.anchor.v1";

impl Anchor {
    /// Writes all parameters as f32 to `path`, whole or not at all.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let bytes = self.file_bytes(path)?;
        atomic_file::write(path, &bytes)
            .map_err(|e| Error::File { path: path.into(), problem: e.to_string() })
    }

    /// The sha256 of the file that [`Anchor::save`] writes, in hexadecimal digits: what an anchor is known by,
    /// wherever it was read from.
    ///
    /// # Errors
    /// When a parameter cannot be copied from its device.
    pub fn sha256(&self) -> Result<String> {
        let digest = Sha256::digest(self.file_bytes(Path::new("anchor.safetensors"))?);
        Ok(digest.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// What is saved, to `path`.
    fn file_bytes(&self, path: &Path) -> Result<Vec<u8>> {
        let tensor = |(name, parameter): (&String, &Tensor)| {
            Ok((name.clone(), parameter.to_device(&Device::Cpu)?.to_dtype(DType::F32)?))
        };
        let tensors = self.parameters().iter().map(tensor).collect::<Result<Vec<_>>>()?;
        let header = serde_json::json!({ "format": FORMAT, "config": self.config() }).to_string();
        let metadata = HashMap::from([(KEY.into(), header)]);
        safetensors::serialize(tensors, Some(metadata))
            .map_err(|e| Error::File { path: path.into(), problem: e.to_string() })
    }

    /// Reads what [`Anchor::save`] wrote.
    ///
    /// # Errors
    /// When the file is not a whole anchor checkpoint; names the tensor that is missing or has another
    /// shape than the configuration asks for.
    pub fn load(path: &Path, (device, dtype): (&Device, DType)) -> Result<Self> {
        let file_error = |problem: String| Error::File { path: path.into(), problem };
        let bytes = fs::read(path).map_err(|e| file_error(e.to_string()))?;
        let (_, metadata) = SafeTensors::read_metadata(&bytes).map_err(|e| file_error(e.to_string()))?;
        let header = metadata.metadata().as_ref().and_then(|metadata| metadata.get(KEY));
        let header = header.map_or("{}", String::as_str);
        let header: serde_json::Value =
            serde_json::from_str(header).map_err(|e| file_error(format!("metadata {KEY}: {e}")))?;
        let format = header["format"].as_str().unwrap_or("none");
        if format != FORMAT {
            return Err(file_error(format!("expected format {FORMAT}, found {format}")));
        }
        let config = AnchorConfig::deserialize(&header["config"])
            .map_err(|e| file_error(format!("metadata {KEY}: config: {e}")))?;
        config.check()?;
        let tensors = SafeTensors::deserialize(&bytes).map_err(|e| file_error(e.to_string()))?;
        let mut parameters = BTreeMap::new();
        for (name, shape) in config.parameters() {
            let Ok(view) = tensors.tensor(&name) else {
                return Err(Error::Tensor { path: path.into(), tensor: name, problem: "missing" });
            };
            if view.shape() != shape || view.dtype() != Dtype::F32 {
                let found = view.shape().to_vec();
                return Err(Error::Shape { path: path.into(), tensor: name, expected: shape, found });
            }
            let (values, _) = view.data().as_chunks::<4>();
            let values: Vec<f32> = values.iter().map(|&b| f32::from_le_bytes(b)).collect();
            let tensor = Tensor::from_vec(values, shape, device)?.to_dtype(dtype)?;
            parameters.insert(name, tensor);
        }
        if let Some(extra) = tensors.names().into_iter().find(|name| !parameters.contains_key(*name)) {
            let tensor = extra.to_string();
            return Err(Error::Tensor { path: path.into(), tensor, problem: "not part of this anchor" });
        }
        Ok(Self::from_parameters(config, parameters))
    }
}
