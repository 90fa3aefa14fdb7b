use std::sync::Arc;

use cluster_tree::ClusterId;

use crate::scratch::{Scratch, Slot};
use crate::{Placement, Result, Step};

/// Numbers of a block, in memory or on disk. A clone shares them, and they never change while it does.
#[derive(Clone, PartialEq, Debug)]
pub struct Array(Place);

#[derive(Clone, PartialEq, Debug)]
enum Place {
    Memory(Arc<Vec<f32>>),
    Disk(Arc<Slot>),
}

/// One block that has been updated, with its optimizer state. `values`, `m` and `v` have the
/// block's length, and a clone shares them: an update writes beside what others still hold.
#[derive(Clone, PartialEq, Debug)]
pub struct Row {
    /// The weights.
    pub values: Array,
    /// First moments of the gradient.
    pub m: Array,
    /// Second moments of the gradient.
    pub v: Array,
    /// Updates of this block so far.
    pub steps: u64,
    /// The step of the last of them; of a row that was loaded, at most the step of its checkpoint.
    pub last: Step,
}

/// A row in memory, as an update wants it.
pub(crate) struct Loaded {
    pub(crate) values: Arc<Vec<f32>>,
    pub(crate) m: Arc<Vec<f32>>,
    pub(crate) v: Arc<Vec<f32>>,
    pub(crate) steps: u64,
}

/// The updated blocks of a shard as they were after a step, or those of them that were updated
/// since an earlier one.
#[derive(Clone, PartialEq, Debug)]
pub struct Snapshot {
    /// The last step applied.
    pub step: Step,
    /// The part of the bank that the shard owns.
    pub placement: Placement,
    /// In the order of ids.
    pub rows: Vec<(ClusterId, Row)>,
}

impl Array {
    /// The numbers, shared if they are in memory.
    ///
    /// # Errors
    /// When they are on a disk that fails or has kept something else.
    pub fn read(&self) -> Result<Arc<Vec<f32>>> {
        match &self.0 {
            Place::Memory(values) => Ok(Arc::clone(values)),
            Place::Disk(slot) => slot.read().map(Arc::new),
        }
    }

    /// The numbers, if no disk need be asked for them.
    pub fn in_memory(&self) -> Option<&Arc<Vec<f32>>> {
        match &self.0 {
            Place::Memory(values) => Some(values),
            Place::Disk(_) => None,
        }
    }

    pub(crate) fn len(&self) -> usize {
        match &self.0 {
            Place::Memory(values) => values.len(),
            Place::Disk(slot) => slot.len(),
        }
    }

    /// CRC-32C of the numbers as bytes, which is known of those on disk.
    pub(crate) fn crc32c(&self) -> u32 {
        match &self.0 {
            Place::Memory(values) => crc32c::crc32c(bytemuck::cast_slice(values)),
            Place::Disk(slot) => slot.crc(),
        }
    }

    fn stored(&self, scratch: &Arc<Scratch>) -> Result<Self> {
        match &self.0 {
            Place::Memory(values) => Ok(Self(Place::Disk(Arc::new(scratch.write(values)?)))),
            Place::Disk(_) => Ok(self.clone()),
        }
    }
}

impl From<Arc<Vec<f32>>> for Array {
    fn from(values: Arc<Vec<f32>>) -> Self {
        Self(Place::Memory(values))
    }
}

impl From<Vec<f32>> for Array {
    fn from(values: Vec<f32>) -> Self {
        Arc::new(values).into()
    }
}

impl Row {
    /// Bytes in memory.
    pub fn host_bytes(&self) -> u64 {
        let arrays = [&self.values, &self.m, &self.v].into_iter().filter_map(Array::in_memory);
        arrays.map(|values| size_of_val(values.as_slice()) as u64).sum()
    }

    /// The same row on disk.
    pub(crate) fn stored(&self, scratch: &Arc<Scratch>) -> Result<Self> {
        let [values, m, v] = [&self.values, &self.m, &self.v].map(|array| array.stored(scratch));
        Ok(Self { values: values?, m: m?, v: v?, ..*self })
    }

    pub(crate) fn load(&self) -> Result<Loaded> {
        let [values, m, v] = [&self.values, &self.m, &self.v].map(Array::read);
        Ok(Loaded { values: values?, m: m?, v: v?, steps: self.steps })
    }
}

impl Loaded {
    pub(crate) fn into_row(self, last: Step) -> Row {
        let Self { values, m, v, steps } = self;
        Row { values: values.into(), m: m.into(), v: v.into(), steps, last }
    }
}
