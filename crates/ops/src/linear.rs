//! y = x·Wᵀ without the transposed copies that a composed product makes in its backward.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};

use crate::buffer::{output, tensor_like, values, with};
use crate::gemm::{Into, Size, Threads, View, gemm};

/// y = x·Wᵀ; `x` [.., I], `weight` [O, I], y [.., O].
pub fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    if crate::fused(x) {
        return x.contiguous()?.apply_op2(weight, Linear);
    }
    let (o, i) = weight.dims2()?;
    let mut shape = x.dims().to_vec();
    let rows = x.elem_count() / i;
    *shape.last_mut().expect("a matrix has a last dimension") = o;
    x.reshape((rows, i))?.matmul(&weight.t()?)?.reshape(shape)
}

struct Linear;

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        w: &CpuStorage,
        w_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (o, i) = w_layout.shape().dims2()?;
        let mut shape = x_layout.shape().dims().to_vec();
        match shape.last_mut() {
            Some(last) if *last == i => *last = o,
            _ => candle_core::bail!("linear: x {:?} does not end in {i}", x_layout.shape()),
        }
        let (x, w) = (values(x, x_layout)?, values(w, w_layout)?);
        let n = x.len() / i;
        let mut y = output(n * o);
        let size = Size { m: n, n: o, k: i };
        gemm(size, (&mut y, o), View::rows(x, i), View::transposed(w, i), Into::Overwrite, Threads::All);
        Ok((CpuStorage::F32(y), Shape::from(shape)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (o, i) = w.dims2()?;
        let n = x.elem_count() / i;
        let product = |size: Size, a: View, b: View| {
            let mut c = output(size.m * size.n);
            gemm(size, (&mut c, size.n), a, b, Into::Overwrite, Threads::All);
            c
        };
        let dx = with(w, |w| {
            with(dy, |dy| product(Size { m: n, n: i, k: o }, View::rows(dy, o), View::rows(w, i)))
        })??;
        // Frozen weights need none.
        let dw = match w.track_op() {
            true => Some(with(x, |x| {
                with(dy, |dy| product(Size { m: o, n: i, k: n }, View::transposed(dy, o), View::rows(x, i)))
            })??),
            false => None,
        };
        Ok((Some(tensor_like(dx, x)?), dw.map(|dw| tensor_like(dw, w)).transpose()?))
    }
}
