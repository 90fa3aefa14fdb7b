//! Each fused f32 body against the composed body in f64, forward and backward, and the composed body
//! against central differences, over odd sizes.

use candle_core::{DType, Device, Result, Tensor, Var};
use ops::{AttentionShape, CrossEntropy, IGNORE, RopeTable, Run};

/// Values that repeat on every machine: a low-discrepancy sequence in (−scale, scale).
fn values(n: usize, seed: usize, scale: f64) -> Vec<f64> {
    (0..n)
        .map(|i| (((i + 1) * (seed * 2 + 1)) as f64 * 0.618_033_988_75).fract() * 2.0 * scale - scale)
        .collect()
}

struct Case<'a> {
    shapes: Vec<Vec<usize>>,
    /// The op, from its operands to a tensor of any shape.
    op: &'a dyn Fn(&[Tensor]) -> Result<Tensor>,
}

impl Case<'_> {
    fn operands(&self, dtype: DType) -> Result<Vec<Var>> {
        let make = |(i, shape): (usize, &Vec<usize>)| {
            let n = shape.iter().product();
            Var::from_tensor(
                &Tensor::from_vec(values(n, i + 1, 0.9), shape.clone(), &Device::Cpu)?.to_dtype(dtype)?,
            )
        };
        self.shapes.iter().enumerate().map(make).collect()
    }

    /// A scalar that weighs every output differently, so that no gradient cancels.
    fn scalar(&self, operands: &[Tensor]) -> Result<Tensor> {
        let y = (self.op)(operands)?;
        let weights = values(y.elem_count(), 17, 1.0);
        let weights = Tensor::from_vec(weights, y.shape(), &Device::Cpu)?.to_dtype(y.dtype())?;
        (y * weights)?.sum_all()
    }

    fn gradients(&self, dtype: DType) -> Result<(f64, Vec<Vec<f64>>)> {
        let vars = self.operands(dtype)?;
        let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
        let loss = self.scalar(&tensors)?;
        let store = loss.backward()?;
        let gradient = |v: &Var| {
            let g = store.get(v).expect("every operand gets a gradient");
            g.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>()
        };
        Ok((loss.to_dtype(DType::F64)?.to_scalar()?, vars.iter().map(gradient).collect::<Result<_>>()?))
    }

    fn check(&self, name: &str) {
        let (fused, fused_gradients) = self.gradients(DType::F32).expect(name);
        let (reference, reference_gradients) = self.gradients(DType::F64).expect(name);
        assert!(
            (fused - reference).abs() < 1e-4 * (1.0 + reference.abs()),
            "{name}: {fused} against {reference}"
        );
        for (i, (fused, reference)) in fused_gradients.iter().zip(&reference_gradients).enumerate() {
            let size = reference.iter().map(|x| x * x).sum::<f64>().sqrt().max(1e-12);
            let error = fused.iter().zip(reference).map(|(a, b)| (a - b) * (a - b)).sum::<f64>().sqrt();
            assert!(error / size < 2e-5, "{name}: operand {i}: gradient off by {}", error / size);
        }
        self.finite_differences(name, &reference_gradients).expect(name);
    }

    /// Central differences of the f64 body at some elements of each operand.
    fn finite_differences(&self, name: &str, gradients: &[Vec<f64>]) -> Result<()> {
        let h = 1e-5;
        for (i, shape) in self.shapes.iter().enumerate() {
            let n: usize = shape.iter().product();
            for element in (0..n).step_by(n.div_ceil(7)) {
                let at = |delta: f64| -> Result<f64> {
                    let mut tensors: Vec<Tensor> = vec![];
                    for (j, var) in self.operands(DType::F64)?.iter().enumerate() {
                        let mut x = var.flatten_all()?.to_vec1::<f64>()?;
                        if i == j {
                            x[element] += delta;
                        }
                        tensors.push(Tensor::from_vec(x, self.shapes[j].clone(), &Device::Cpu)?);
                    }
                    self.scalar(&tensors)?.to_scalar()
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

#[test]
fn rms_norm() {
    for (rows, d) in [(1, 2), (3, 7), (70, 33), (130, 64)] {
        let op = |x: &[Tensor]| ops::rms_norm(&x[0], &x[1], 1e-6);
        Case { shapes: vec![vec![rows, d], vec![d]], op: &op }.check("rms norm");
    }
}

#[test]
fn rope_with_an_offset() {
    for (b, t, heads, k, first) in [(1, 1, 1, 2, 0), (2, 37, 3, 10, 5), (3, 33, 2, 32, 0)] {
        let table = RopeTable::new(64, k, 10_000.0);
        let op = |x: &[Tensor]| ops::rope(&x[0], &table, first);
        Case { shapes: vec![vec![b, t, heads * k]], op: &op }.check("rope");
    }
}

#[test]
fn rope_outside_its_table_is_an_error() {
    let x = Tensor::zeros((1, 4, 8), DType::F32, &Device::Cpu).unwrap();
    let error = ops::rope(&x, &RopeTable::new(5, 4, 1e4), 2).unwrap_err().to_string();
    assert!(error.contains("position 5") && error.contains("holds 5"), "{error}");
}

#[test]
fn linear() {
    for (b, t, i, o) in [(1, 1, 1, 1), (2, 3, 5, 7), (3, 41, 33, 65)] {
        let op = |x: &[Tensor]| ops::linear(&x[0], &x[1]);
        Case { shapes: vec![vec![b, t, i], vec![o, i]], op: &op }.check("linear");
    }
}

#[test]
fn embedding_sums_the_gradient_of_repeated_tokens() {
    let ids: Vec<u32> = (0..3 * 50).map(|i| (i * i % 13) as u32).collect();
    let op = |x: &[Tensor]| ops::embedding(&x[0], &ids, (3, 50));
    Case { shapes: vec![vec![600, 9]], op: &op }.check("embedding");
    let table = Tensor::zeros((4, 2), DType::F32, &Device::Cpu).unwrap();
    let error = ops::embedding(&table, &[1, 4], (1, 2)).unwrap_err().to_string();
    assert!(error.contains("token 4 of a vocabulary of 4"), "{error}");
}

fn check_attention(b: usize, t: usize, s: usize, heads: usize, k: usize, starts: &[u32]) {
    let shape = AttentionShape { batch: b, queries: t, keys: s, heads, head_width: k };
    let op = |x: &[Tensor]| ops::attention(&x[0], &x[1], &x[2], starts, shape);
    let d = heads * k;
    Case { shapes: vec![vec![b, t, d], vec![b, s, d], vec![b, s, d]], op: &op }.check("attention");
}

#[test]
fn attention_over_whole_sequences_and_over_documents() {
    check_attention(1, 1, 1, 1, 1, &[0]);
    check_attention(2, 67, 67, 2, 5, &vec![0; 2 * 67]);
    // Documents that begin at 0, 10, 64, 65 and 129, so tiles see none, one or several of them.
    let start = |t: u32| [129, 65, 64, 10, 0].into_iter().find(|&s| s <= t).unwrap();
    let starts: Vec<u32> = (0..2).flat_map(|_| (0..140).map(start)).collect();
    check_attention(2, 140, 140, 3, 4, &starts);
}

#[test]
fn attention_of_new_queries_against_earlier_keys() {
    check_attention(2, 3, 9, 2, 4, &[0, 2, 2, 4, 4, 8]);
}

#[test]
fn attention_that_would_see_no_key_is_an_error() {
    let x = Tensor::zeros((1, 2, 4), DType::F32, &Device::Cpu).unwrap();
    let shape = AttentionShape { batch: 1, queries: 2, keys: 2, heads: 1, head_width: 4 };
    let error = ops::attention(&x, &x, &x, &[1, 0], shape).unwrap_err().to_string();
    assert!(error.contains("query 0 of sequence 0 starts at key 1"), "{error}");
}

#[test]
fn gated_ffn_of_one_block_and_of_many() {
    let all = [Run { block: 0, first_row: 0, n_rows: 75 }];
    let op = |x: &[Tensor]| ops::gated_ffn(&x[0], &x[1], &x[2], &all);
    Case { shapes: vec![vec![3, 25, 6], vec![3, 25, 6], vec![1, 3, 11, 6]], op: &op }.check("one block");
    // Block 2 serves two runs, block 1 none, and rows 30..35 use no block.
    let many = [
        Run { block: 2, first_row: 0, n_rows: 20 },
        Run { block: 0, first_row: 20, n_rows: 10 },
        Run { block: 2, first_row: 35, n_rows: 33 },
        Run { block: 3, first_row: 68, n_rows: 7 },
    ];
    let op = |x: &[Tensor]| ops::gated_ffn(&x[0], &x[1], &x[2], &many);
    Case { shapes: vec![vec![3, 25, 6], vec![3, 25, 6], vec![4, 3, 5, 6]], op: &op }.check("many blocks");
}

#[test]
fn gated_ffn_refuses_runs_that_overlap() {
    let x = Tensor::zeros((4, 2), DType::F32, &Device::Cpu).unwrap();
    let w = Tensor::zeros((1, 3, 2, 2), DType::F32, &Device::Cpu).unwrap();
    let runs = [Run { block: 0, first_row: 0, n_rows: 3 }, Run { block: 0, first_row: 2, n_rows: 2 }];
    let error = ops::gated_ffn(&x, &x, &w, &runs).unwrap_err().to_string();
    assert!(error.contains("rows below 3 being taken"), "{error}");
}

#[test]
fn linear_cross_entropy_with_ignored_rows_and_z_loss() {
    for (n, d, v) in [(1, 1, 2), (5, 3, 33), (300, 7, 40)] {
        let targets: Vec<u32> =
            (0..n).map(|i| if i % 5 == 3 { IGNORE } else { (i * 7 % v) as u32 }).collect();
        for z_loss in [0.0, 1e-2] {
            let op = |x: &[Tensor]| {
                let options = CrossEntropy { targets: &targets, scale: 0.3, z_loss, train: true };
                let (loss, rows) = ops::linear_cross_entropy(&x[0], &x[1], options)?;
                let scored: f64 = rows.iter().map(|&r| f64::from(r)).sum::<f64>() * 0.3;
                let total = loss.to_dtype(DType::F64)?.to_scalar::<f64>()?;
                assert!(z_loss > 0.0 || (scored - total).abs() < 1e-4 * (1.0 + total.abs()));
                assert!(rows.iter().zip(&targets).all(|(&r, &t)| t != IGNORE || r == 0.0));
                Ok(loss)
            };
            Case { shapes: vec![vec![n, d], vec![v, d]], op: &op }.check("cross-entropy");
        }
    }
}

#[test]
fn adamw_matches_its_definition_in_f64() -> Result<()> {
    let n = 20_000;
    let (start, gradient) = (values(n, 3, 1.0), values(n, 4, 0.01));
    let var = Var::from_tensor(&Tensor::from_vec(start.clone(), n, &Device::Cpu)?.to_dtype(DType::F32)?)?;
    let g = Tensor::from_vec(gradient.clone(), n, &Device::Cpu)?.to_dtype(DType::F32)?;
    let (mut m, mut v) = (vec![0f32; n], vec![0f32; n]);
    let (mut p64, mut m64, mut v64) = (start, vec![0f64; n], vec![0f64; n]);
    for step in 1..=5 {
        let a = ops::AdamW {
            learning_rate: 0.01,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            step,
            gradient_scale: 0.5,
        };
        ops::adamw_step(&var, &g, &mut m, &mut v, a)?;
        for i in 0..n {
            let g = gradient[i] * 0.5;
            m64[i] = 0.9 * m64[i] + 0.1 * g;
            v64[i] = 0.95 * v64[i] + 0.05 * g * g;
            let (mh, vh) =
                (m64[i] / (1.0 - 0.9f64.powi(step as i32)), v64[i] / (1.0 - 0.95f64.powi(step as i32)));
            p64[i] -= 0.01 * 0.1 * p64[i] + 0.01 * mh / (vh.sqrt() + 1e-8);
        }
    }
    for (found, expected) in var.to_vec1::<f32>()?.iter().zip(&p64) {
        assert!((f64::from(*found) - expected).abs() < 1e-5, "{found} against {expected}");
    }
    Ok(())
}

#[test]
fn sum_of_squares_is_exact_enough() -> Result<()> {
    let x = values(50_001, 5, 3.0);
    let expected: f64 = x.iter().map(|x| x * x).sum();
    let found = ops::sum_of_squares(&Tensor::from_vec(x, 50_001, &Device::Cpu)?.to_dtype(DType::F32)?)?;
    assert!((found - expected).abs() < 1e-5 * expected);
    Ok(())
}
