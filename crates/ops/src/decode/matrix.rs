use crate::Precision;
use crate::buffer::Shared;
use crate::gemm::{Addend, Output, Right, Short, Threads, View, bf16, multiply_all, panels_of_rows};

/// How the numbers of a matrix are held. All products and sums are f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Held {
    /// As they are.
    #[default]
    F32,
    /// Rounded to bf16.
    Bf16,
}

/// A matrix W [O, I], packed once for x·Wᵀ, and the bias [O] that each product adds if there is one.
pub struct Matrix {
    right: Right, // [I, O]
    bias: Option<Vec<f32>>,
    n_inputs: usize,
    n_outputs: usize,
}

impl Matrix {
    /// Of `rows` [O, I], row-major.
    ///
    /// # Panics
    /// When there are not O·I numbers.
    pub fn new(rows: &[f32], (n_outputs, n_inputs): (usize, usize), held: Held) -> Self {
        assert_eq!(rows.len(), n_outputs * n_inputs, "numbers of a matrix of {n_outputs} x {n_inputs}");
        let shape = (n_inputs, n_outputs);
        let right = match held {
            Held::F32 => Right::pack(Precision::F32, View::transposed(rows, n_inputs), shape, Threads::All),
            Held::Bf16 => {
                let rounded: Vec<u16> = rows.iter().map(|&x| bf16(x) as u16).collect();
                Right::hold(Short::Bf16(panels_of_rows(&rounded, shape)), shape)
            }
        };
        Self { right, bias: None, n_inputs, n_outputs }
    }

    /// With a bias [O] that each product adds.
    ///
    /// # Panics
    /// When it has another length.
    pub fn with_bias(self, bias: Vec<f32>) -> Self {
        assert_eq!(bias.len(), self.n_outputs, "numbers of a bias of {} outputs", self.n_outputs);
        Self { bias: Some(bias), ..self }
    }

    /// O, the width of what it makes.
    pub fn n_outputs(&self) -> usize {
        self.n_outputs
    }

    /// Bytes of its numbers.
    pub fn bytes(&self) -> usize {
        self.right.bytes()
    }

    /// Row `index` of W, as a table of embeddings is read, to `to` [I].
    ///
    /// # Panics
    /// When there is no such row.
    pub fn row(&self, index: usize, to: &mut [f32]) {
        self.right.column(index, to);
    }

    /// y = x·Wᵀ + bias for `x` [N, I], `y` [N, O].
    ///
    /// # Panics
    /// When the shapes do not fit.
    pub fn multiply(&self, x: &[f32], y: &mut [f32]) {
        self.apply(x, y, Addend::Zero);
    }

    /// y += x·Wᵀ + bias for `x` [N, I], `y` [N, O].
    ///
    /// # Panics
    /// When the shapes do not fit.
    pub fn multiply_add(&self, x: &[f32], y: &mut [f32]) {
        self.apply(x, y, Addend::Itself);
    }

    fn apply(&self, x: &[f32], y: &mut [f32], from: Addend) {
        let n = x.len() / self.n_inputs.max(1);
        assert_eq!((x.len(), y.len()), (n * self.n_inputs, n * self.n_outputs), "elements of x and y");
        let to = Output { to: Shared::new(y), offset: 0, row: self.n_outputs, from };
        // SAFETY: y is [n, O] (above) and uniquely borrowed.
        unsafe { multiply_all((n, View::rows(x, self.n_inputs)), self.right.all(), to, Threads::All) }
        if let Some(bias) = &self.bias {
            for y in y.chunks_exact_mut(self.n_outputs) {
                y.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias);
            }
        }
    }
}
