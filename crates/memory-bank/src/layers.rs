use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The layers of the anchor that have memory. As text `uniform`, `early`, `middle` or `late`, or a list of layers.
///
/// Early, middle and late are the first, the central and the last third of the layers, rounded up, so that
/// each has as many parameters as the others; with 35 layers 0..12, 11..23 and 23..35.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(into = "Written", try_from = "Written")]
pub enum MemoryLayers {
    /// All of them.
    #[default]
    Uniform,
    /// The first third.
    Early,
    /// The central third.
    Middle,
    /// The last third.
    Late,
    /// These, ascending, the lowest being 0.
    List(Vec<usize>),
}

/// How the layers are written.
#[derive(Clone, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected uniform, early, middle, late or a list of layers")]
enum Written {
    Name(String),
    List(Vec<usize>),
}

impl From<MemoryLayers> for Written {
    fn from(layers: MemoryLayers) -> Self {
        match layers {
            MemoryLayers::List(layers) => Self::List(layers),
            named => Self::Name(named.to_string()),
        }
    }
}

impl TryFrom<Written> for MemoryLayers {
    type Error = Error;

    fn try_from(written: Written) -> Result<Self> {
        let name = match written {
            Written::List(layers) => return Ok(Self::List(layers)),
            Written::Name(name) => name,
        };
        let named = [Self::Uniform, Self::Early, Self::Middle, Self::Late];
        named.into_iter().find(|layers| layers.to_string() == name).ok_or_else(|| {
            let expected = "uniform, early, middle, late or a list of layers".to_owned();
            Error::Setting { field: "layers", expected, found: name }
        })
    }
}

impl fmt::Display for MemoryLayers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Uniform => f.write_str("uniform"),
            Self::Early => f.write_str("early"),
            Self::Middle => f.write_str("middle"),
            Self::Late => f.write_str("late"),
            Self::List(layers) => write!(f, "{layers:?}"),
        }
    }
}

impl MemoryLayers {
    pub(crate) fn is_uniform(&self) -> bool {
        *self == Self::Uniform
    }

    /// How many of `n_layers` have memory.
    pub(crate) fn count(&self, n_layers: usize) -> usize {
        match self {
            Self::Uniform => n_layers,
            Self::Early | Self::Middle | Self::Late => n_layers.div_ceil(3),
            Self::List(layers) => layers.len(),
        }
    }

    /// The `index`-th of them, of `n_layers`.
    pub(crate) fn at(&self, n_layers: usize, index: usize) -> usize {
        match self {
            Self::Uniform | Self::Early => index,
            Self::Middle => (n_layers - self.count(n_layers)) / 2 + index,
            Self::Late => n_layers - self.count(n_layers) + index,
            Self::List(layers) => layers[index],
        }
    }

    /// Fails on a list that names no layer, one twice or out of order, or one that the anchor does not have.
    pub(crate) fn validate(&self, n_layers: usize) -> Result<()> {
        let Self::List(layers) = self else { return Ok(()) };
        let ascends = layers.windows(2).all(|pair| pair[0] < pair[1]);
        match layers.last() {
            Some(&last) if ascends && last < n_layers => Ok(()),
            _ => Err(Error::Setting {
                field: "layers",
                expected: format!("at least one layer, ascending, below {n_layers}"),
                found: self.to_string(),
            }),
        }
    }
}
