use std::collections::BTreeMap;
use std::path::Path;

use anchor::{Anchor, Gradients};
use candle_core::{Device, Tensor};
use ops::AdamW;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use crate::checkpoint::write_whole;
use crate::{Error, Result, TrainConfig};

/// AdamW over the anchor's parameters, moments in f32.
pub struct Optimizer {
    /// First and second moments by parameter, on its device.
    moments: BTreeMap<String, [Tensor; 2]>,
}

/// √Σ g² over all parameters.
///
/// # Errors
/// When a parameter got no gradient: an operation dropped it.
pub(crate) fn gradient_norm(anchor: &Anchor, gradients: &Gradients) -> Result<f64> {
    let mut sum = 0.0;
    for (slot, name) in anchor.parameters().keys().enumerate() {
        sum += ops::sum_of_squares(of_parameter(gradients, slot, name)?)?;
    }
    Ok(sum.sqrt())
}

fn of_parameter<'g>(gradients: &'g Gradients, slot: usize, name: &str) -> Result<&'g Tensor> {
    let gradient = gradients.get(slot);
    Ok(gradient.ok_or_else(|| candle_core::Error::Msg(format!("anchor parameter {name} got no gradient")))?)
}

impl Optimizer {
    /// Zero moments for every parameter.
    ///
    /// # Errors
    /// When there is no room for them.
    pub fn new(anchor: &Anchor) -> Result<Self> {
        let zeros = |(name, parameter): (&String, &Tensor)| {
            Ok((name.clone(), [parameter.zeros_like()?, parameter.zeros_like()?]))
        };
        Ok(Self { moments: anchor.parameters().iter().map(zeros).collect::<Result<_>>()? })
    }

    /// Applies step `step` (from 1) to every parameter; norm gains do not decay.
    pub(crate) fn step(
        &mut self,
        anchor: &Anchor,
        gradients: &Gradients,
        (config, step, scale): (&TrainConfig, u64, f64),
    ) -> Result<()> {
        // Both maps are in the order of names.
        let moments = self.moments.values();
        for ((slot, (name, weights)), [m, v]) in anchor.parameters().iter().enumerate().zip(moments) {
            let gradient = of_parameter(gradients, slot, name)?;
            let decays = weights.dims().len() > 1;
            let adamw = AdamW {
                learning_rate: config.schedule().at(step),
                beta1: config.beta1,
                beta2: config.beta2,
                eps: config.eps,
                weight_decay: if decays { config.weight_decay } else { 0.0 },
                step,
                gradient_scale: scale,
            };
            ops::adamw_step(weights, gradient, [m, v], adamw)?;
        }
        Ok(())
    }

    /// Writes the moments as `m.<parameter>` and `v.<parameter>`.
    pub(crate) fn save(&self, path: &Path) -> Result<()> {
        let mut owned: Vec<(String, Vec<u8>)> = vec![];
        for (name, moments) in &self.moments {
            for (kind, moment) in ["m", "v"].into_iter().zip(moments) {
                let values = moment.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?;
                let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
                owned.push((format!("{kind}.{name}"), bytes));
            }
        }
        let views = owned
            .iter()
            .map(|(name, bytes)| Ok((name, TensorView::new(Dtype::F32, vec![bytes.len() / 4], bytes)?)))
            .collect::<std::result::Result<Vec<_>, safetensors::SafeTensorError>>()
            .map_err(|e| Error::file(path, e))?;
        let whole = safetensors::serialize(views, None).map_err(|e| Error::file(path, e))?;
        write_whole(path, &whole)
    }

    /// Reads what `save` wrote for the same anchor.
    pub(crate) fn load(path: &Path, anchor: &Anchor) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|e| Error::file(path, e))?;
        let tensors = SafeTensors::deserialize(&bytes).map_err(|e| Error::file(path, e))?;
        let mut optimizer = Self::new(anchor)?;
        for (name, moments) in &mut optimizer.moments {
            for (kind, moment) in ["m", "v"].into_iter().zip(moments) {
                let name = format!("{kind}.{name}");
                let view = tensors.tensor(&name).map_err(|e| Error::file(path, format!("{name}: {e}")))?;
                let (found, _) = view.data().as_chunks::<4>();
                if found.len() != moment.elem_count() {
                    let problem =
                        format!("{name}: expected {} values, found {}", moment.elem_count(), found.len());
                    return Err(Error::file(path, problem));
                }
                let values: Vec<f32> = found.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
                *moment = Tensor::from_vec(values, moment.shape(), moment.device())?;
            }
        }
        Ok(optimizer)
    }
}
