//! A case of an operation: its bodies against each other, and against differences.

use candle_core::{DType, Device, Result, Tensor};
use ops::{Gradients, Precision, Tape, Traced};

/// Values that repeat on every machine: a low-discrepancy sequence in (−scale, scale).
pub(crate) fn values(n: usize, seed: usize, scale: f64) -> Vec<f64> {
    (0..n)
        .map(|i| (((i + 1) * (seed * 2 + 1)) as f64 * 0.618_033_988_75).fract() * 2.0 * scale - scale)
        .collect()
}

pub(crate) type Op<'a> = &'a dyn Fn(&mut Tape, &[Traced]) -> Result<Traced>;

pub(crate) struct Case<'a> {
    /// Of the operands; parameters come after the activations.
    pub(crate) shapes: Vec<Vec<usize>>,
    pub(crate) n_activations: usize,
    /// The op, from its operands to a tensor of any shape.
    pub(crate) op: Op<'a>,
}

/// A scalar and its gradients by operand.
type Found = (f64, Vec<Vec<f64>>);

/// Where and how a body runs.
#[derive(Clone)]
pub(crate) struct Body {
    pub(crate) device: Device,
    dtype: DType,
    precision: Precision,
}

impl Body {
    fn cpu(dtype: DType, precision: Precision) -> Self {
        Self { device: Device::Cpu, dtype, precision }
    }

    /// The fused bodies of this build, and how far each may be from the reference. Those for GPUs take
    /// activations of the type of their products, and need a GPU.
    pub(crate) fn fused() -> Vec<(Self, f64)> {
        let mut all = vec![
            (Self::cpu(DType::F32, Precision::F32), 2e-5),
            (Self::cpu(DType::F32, Precision::Bf16), 2e-2),
        ];
        if cfg!(feature = "cuda") {
            let gpu = Device::new_cuda_with_stream(0).expect("a GPU, which the feature cuda tests");
            for (dtype, precision, tolerance) in
                [(DType::F32, Precision::F32, 1e-4), (DType::BF16, Precision::Bf16, 3e-2)]
            {
                all.push((Self { device: gpu.clone(), dtype, precision }, tolerance));
            }
        }
        all
    }
}

impl Case<'_> {
    fn operands(&self, body: &Body) -> Result<Vec<Tensor>> {
        let make = |(i, shape): (usize, &Vec<usize>)| {
            let values = values(shape.iter().product(), i + 1, 0.9);
            // Parameters are f32 beside activations of bf16.
            let dtype = match body.dtype {
                DType::BF16 if i >= self.n_activations => DType::F32,
                dtype => dtype,
            };
            Tensor::from_vec(values, shape.clone(), &body.device)?.to_dtype(dtype)
        };
        self.shapes.iter().enumerate().map(make).collect()
    }

    /// A scalar that weighs every output differently, so that no gradient cancels, and the weights.
    fn scalar(y: &Tensor) -> Result<(f64, Tensor)> {
        let weights = values(y.elem_count(), 17, 1.0);
        let weights = Tensor::from_vec(weights, y.shape(), y.device())?.to_dtype(y.dtype())?;
        let product = (y.to_dtype(DType::F64)? * weights.to_dtype(DType::F64)?)?;
        Ok((product.sum_all()?.to_scalar()?, weights))
    }

    /// One backward pass after another over the same gradients: the second must add to the first.
    fn gradients(&self, body: &Body, n_passes: usize) -> Result<Found> {
        self.gradients_without(None, body, n_passes)
    }

    /// The same with one operand that gets no gradient.
    fn gradients_without(&self, constant: Option<usize>, body: &Body, n_passes: usize) -> Result<Found> {
        let mut gradients = Gradients::default();
        let operands = self.operands(body)?;
        let n = operands.len();
        let leaf = |(x, slot): (Tensor, usize)| match constant == Some(slot) {
            true => Traced::constant(x),
            false => Traced::leaf(x, slot),
        };
        let leaves: Vec<Traced> = operands.into_iter().zip(0..).map(leaf).collect();
        let mut loss = 0.0;
        for _ in 0..n_passes {
            let mut tape = Tape::recording(body.precision, &mut gradients, n);
            let y = (self.op)(&mut tape, &leaves)?;
            let (scalar, weights) = Self::scalar(y.value())?;
            loss += scalar / n_passes as f64;
            if !y.is_constant() {
                tape.seed(&y, &weights)?;
            }
            tape.backward()?;
        }
        let gradient = |slot: usize| {
            let Some(g) = gradients.get(slot) else {
                assert_eq!(constant, Some(slot), "operand {slot} got no gradient");
                return Ok(vec![]);
            };
            let g: Vec<f64> = g.flatten_all()?.to_dtype(DType::F64)?.to_vec1()?;
            Ok(g.into_iter().map(|x| x / n_passes as f64).collect())
        };
        Ok((loss, (0..n).map(gradient).collect::<Result<_>>()?))
    }

    pub(crate) fn check(&self, name: &str) {
        let reference = Body::cpu(DType::F64, Precision::F32);
        let expected = self.gradients(&reference, 1).expect(name);
        for (body, tolerance) in Body::fused() {
            for n_passes in [1, 2] {
                let name = format!("{name} on {:?} in {:?}, {n_passes} passes", body.device, body.precision);
                let found = self.gradients(&body, n_passes).expect(&name);
                Self::compare(&name, &found, &expected, tolerance);
            }
        }
        for constant in 0..self.shapes.len() {
            let name = format!("{name}, operand {constant} constant");
            let body = Body::cpu(DType::F32, Precision::F32);
            let mut found = self.gradients_without(Some(constant), &body, 1).expect(&name);
            assert!(found.1[constant].is_empty(), "{name}: it got a gradient");
            found.1[constant].clone_from(&expected.1[constant]);
            Self::compare(&name, &found, &expected, 2e-5);
        }
        self.finite_differences(name, &reference, &expected.1).expect(name);
    }

    fn compare(name: &str, (found, gradients): &Found, (expected, references): &Found, tolerance: f64) {
        assert!(
            (found - expected).abs() < 5.0 * tolerance * (1.0 + expected.abs()),
            "{name}: {found}, {expected}"
        );
        for (i, (found, reference)) in gradients.iter().zip(references).enumerate() {
            // A gradient that is 0 (one query of one key) may be off by the rounding of what cancels in it.
            let size = reference.iter().map(|x| x * x).sum::<f64>().sqrt() + 0.05;
            let error = found.iter().zip(reference).map(|(a, b)| (a - b) * (a - b)).sum::<f64>().sqrt();
            assert!(error / size < tolerance, "{name}: operand {i}: gradient off by {}", error / size);
        }
    }

    /// Central differences of the f64 body at some elements of each operand.
    fn finite_differences(&self, name: &str, reference: &Body, gradients: &[Vec<f64>]) -> Result<()> {
        let h = 1e-5;
        for (i, shape) in self.shapes.iter().enumerate() {
            let n: usize = shape.iter().product();
            for element in (0..n).step_by(n.div_ceil(7)) {
                let at = |delta: f64| -> Result<f64> {
                    let mut operands = self.operands(reference)?;
                    let mut x = operands[i].flatten_all()?.to_vec1::<f64>()?;
                    x[element] += delta;
                    operands[i] = Tensor::from_vec(x, shape.clone(), &Device::Cpu)?;
                    let operands: Vec<Traced> = operands.into_iter().map(Traced::constant).collect();
                    let y = (self.op)(&mut Tape::off(Precision::F32), &operands)?;
                    Ok(Self::scalar(y.value())?.0)
                };
                let expected = (at(h)? - at(-h)?) / (2.0 * h);
                let found = gradients[i][element];
                assert!(
                    (found - expected).abs() < 1e-6 * (1.0 + expected.abs()),
                    "{name}: operand {i} element {element}: {found} against difference {expected}"
                );
            }
        }
        Ok(())
    }
}
