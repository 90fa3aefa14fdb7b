use nearest::Panels;

/// The centroids of one node, K of them or fewer: an inactive one is never chosen.
#[derive(Clone, PartialEq)]
pub(crate) struct Centroids {
    dim: usize,
    values: Vec<f32>,  // [K, D]
    active: Vec<bool>, // [K]
}

impl Centroids {
    /// K inactive centroids.
    pub(crate) fn inactive(k: usize, dim: usize) -> Self {
        Self { dim, values: vec![0.0; k * dim], active: vec![false; k] }
    }

    /// Sets centroid `index`, which makes it active.
    pub(crate) fn set(&mut self, index: usize, values: impl Iterator<Item = f32>) {
        let centroid = &mut self.values[index * self.dim..][..self.dim];
        centroid.iter_mut().zip(values).for_each(|(to, from)| *to = from);
        self.active[index] = true;
    }

    pub(crate) fn get(&self, index: usize) -> &[f32] {
        &self.values[index * self.dim..][..self.dim]
    }

    pub(crate) fn is_active(&self, index: usize) -> bool {
        self.active[index]
    }

    pub(crate) fn len(&self) -> usize {
        self.active.len()
    }

    pub(crate) fn into_values(self) -> Vec<f32> {
        self.values
    }
}

/// Centroids with their codes, as group 0.
pub(crate) struct Coded {
    pub(crate) centroids: Centroids,
    pub(crate) panels: Panels,
}

impl Coded {
    /// K inactive centroids.
    pub(crate) fn none(k: usize, dim: usize) -> Self {
        Self { centroids: Centroids::inactive(k, dim), panels: Panels::absent(1, k, dim) }
    }

    /// Codes those of `centroids` that are not the same as before; the origin always is.
    pub(crate) fn set(&mut self, centroids: &Centroids, origin: &[f32]) {
        for index in 0..centroids.len() {
            let (before, now) = (self.centroids.is_active(index), centroids.is_active(index));
            if now && !(before && self.centroids.get(index) == centroids.get(index)) {
                self.panels.set(0, index, centroids.get(index), origin);
                self.centroids.set(index, centroids.get(index).iter().copied());
            } else if before && !now {
                self.panels.unset(0, index);
                self.centroids.active[index] = false;
            }
        }
    }
}
