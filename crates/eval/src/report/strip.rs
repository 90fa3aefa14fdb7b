//! The strip in a table's row: where each memory's value lies between the table's smallest and largest.

use super::axis::{Scale, drawable, extent};
use super::palette::look;
use super::svg::Svg;

/// A memory's value in a row.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reading<'a> {
    pub(super) memory: &'a str,
    pub(super) value: f64,
    /// Its interval, if it has one.
    pub(super) interval: Option<(f64, f64)>,
}

/// The common scale of the strips in a table's column.
pub(super) struct Strip {
    scale: Scale,
    logarithmic: bool,
    /// The smallest and largest value.
    pub(super) ends: (f64, f64),
}

impl Strip {
    const WIDTH: f64 = 150.0;
    const HEIGHT: f64 = 22.0;

    /// A linear scale over `values`; none if nothing can be drawn.
    pub(super) fn linear(values: impl Iterator<Item = f64>) -> Option<Self> {
        let ends = extent(values)?;
        Some(Self { scale: Scale::new(ends, (7.0, Self::WIDTH - 7.0)), logarithmic: false, ends })
    }

    /// A logarithmic scale over the positive of `values`.
    pub(super) fn logarithmic(values: impl Iterator<Item = f64>) -> Option<Self> {
        let ends = extent(values.filter(|v| *v > 0.0))?;
        let scale = Scale::new((ends.0.ln(), ends.1.ln()), (7.0, Self::WIDTH - 7.0));
        Some(Self { scale, logarithmic: true, ends })
    }

    fn place(&self, value: f64) -> Option<f64> {
        let value = if self.logarithmic { value.ln() } else { value };
        drawable(value).then(|| self.scale.at(value))
    }

    /// One row: a mark for each reading, the last on top.
    pub(super) fn draw(&self, readings: &[Reading<'_>], label: &str) -> String {
        let middle = Self::HEIGHT / 2.0;
        let mut svg = Svg::new(Self::WIDTH, Self::HEIGHT);
        svg.line("grid", (0.0, middle), (Self::WIDTH, middle));
        for &Reading { memory, value, interval } in readings {
            let look = look(memory);
            let Some(x) = self.place(value) else { continue };
            svg.open_group(look.class);
            if let Some((low, high)) = interval.and_then(|(low, high)| self.place(low).zip(self.place(high)))
            {
                svg.line("interval", (low, middle), (high, middle));
            }
            svg.mark(look.mark, (x, middle), None);
            svg.close_group();
        }
        svg.finish("strip", label)
    }
}
