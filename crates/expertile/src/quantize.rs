//! What a quantized value and its scale are, and where a scale stands.
//!
//! A row of `H` values is cut into groups of 128 (or 32, as in MXFP8) consecutive values, the last of which may have 64
//! of 128; each group has one scale:
//!
//! ```text
//! amax  = max(1e-10, max |x| over the group, NaN ignored)
//! scale = amax * (1/448)                    rounded up to a power of two if asked
//! byte  = e4m3(clamp(x / scale, -448, 448)) round to nearest, ties to even; NaN stays NaN
//! ```
//!
//! All of it is IEEE f32, one rounding per operation, so every backend gives the same bits. An infinite `amax` gives an
//! infinite scale (UE8M0 byte 255, which is NaN): the group reads back as NaN rather than as plausible numbers.

use crate::dtype::E4m3;
use crate::error::{Error, Result, checked_mul, require_exact};
use crate::gemm::WEIGHT_BLOCK;

/// `amax` is never below this, so that a group of zeros has a finite reciprocal (the reference's floor).
pub const AMAX_FLOOR: f32 = 1e-10;

/// Consecutive values that share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Group {
    /// 32, as in MXFP8.
    G32,
    /// 128, as in DeepSeek's 1x128 scaling.
    G128,
}

impl Group {
    /// The number of values.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            Self::G32 => 32,
            Self::G128 => 128,
        }
    }

    /// The fewest values that the last group of a row may have: where 128 does not divide a row, half of it does.
    #[must_use]
    pub const fn smallest(self) -> usize {
        match self {
            Self::G32 => 32,
            Self::G128 => 64,
        }
    }

    /// The group of that many values.
    ///
    /// # Errors
    /// [`Error::Value`] unless `size` is 32 or 128.
    pub fn from_size(size: usize) -> Result<Self> {
        match size {
            32 => Ok(Self::G32),
            128 => Ok(Self::G128),
            _ => Err(Error::value("group", size, "32 or 128")),
        }
    }
}

/// Where the scale of row `r`, group `g` stands among `[M_sum, ceil(H / group)]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ScaleLayout {
    /// f32 at `r * ceil(H / group) + g`.
    RowMajor,
    /// f32 at `r + g * round_up(M_sum, 4)`: what a TMA load of a column of rows wants.
    MnMajor,
    /// UE8M0 exponent bytes, four to an i32: byte `g % 4` of the word at `r + (g / 4) * round_up(M_sum, 4)`.
    PackedUe8m0,
}

impl ScaleLayout {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::RowMajor, Self::MnMajor, Self::PackedUe8m0];

    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::RowMajor => "row_major",
            Self::MnMajor => "mn_major",
            Self::PackedUe8m0 => "packed_ue8m0",
        }
    }

    /// Groups whose scales share a word of 4 bytes.
    #[must_use]
    pub const fn groups_per_word(self) -> usize {
        match self {
            Self::RowMajor | Self::MnMajor => 1,
            Self::PackedUe8m0 => 4,
        }
    }

    /// Where a column's words stand together: what the words from one column to the next are a multiple of. None where
    /// a row's do.
    #[must_use]
    pub const fn column_multiple(self) -> Option<usize> {
        match self {
            Self::RowMajor => None,
            Self::MnMajor | Self::PackedUe8m0 => Some(COLUMN_MULTIPLE),
        }
    }
}

/// A column of words starts on 16 bytes.
const COLUMN_MULTIPLE: usize = 4;

impl std::str::FromStr for ScaleLayout {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|layout| layout.name() == name);
        found.ok_or_else(|| Error::Name {
            argument: "scale_layout",
            actual: name.into(),
            expected: "row_major, mn_major, packed_ue8m0",
        })
    }
}

/// The matrix of words that scales are read as: `[rows, columns]`, strides in words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ScaleMatrix {
    /// `M_sum`.
    pub rows: usize,
    /// Words to a row.
    pub columns: usize,
    /// Words from one row to the next.
    pub row_stride: usize,
    /// Words from one column to the next.
    pub column_stride: usize,
}

impl ScaleMatrix {
    /// Words that it takes, those between the rows' end and the next column included.
    ///
    /// # Errors
    /// [`Error::Overflow`].
    pub fn words(self) -> Result<usize> {
        match self.row_stride {
            1 if self.column_stride != 1 => checked_mul("scales", self.column_stride, self.columns),
            _ => checked_mul("scales", self.rows, self.columns),
        }
    }
}

/// Which value a scale takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ScaleRounding {
    /// `amax * (1/448)`.
    Exact,
    /// The smallest power of two that is at least that.
    PowerOfTwo,
}

/// Group, layout and rounding of the scales of one operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ScaleFormat {
    group: Group,
    layout: ScaleLayout,
    rounding: ScaleRounding,
}

impl ScaleFormat {
    /// What vLLM feeds DeepGEMM on Hopper, without the transpose: 1x128, f32, MN-major.
    pub const HOPPER: Self = Self { group: Group::G128, layout: ScaleLayout::MnMajor, rounding: ScaleRounding::Exact };

    /// What goes with rows that travel or stand in a CPU's memory: 1x128, f32, a row's scales together.
    pub const ROW_MAJOR: Self =
        Self { group: Group::G128, layout: ScaleLayout::RowMajor, rounding: ScaleRounding::Exact };

    /// f32 scales in row-major or MN-major order.
    ///
    /// # Errors
    /// [`Error::Name`] for [`ScaleLayout::PackedUe8m0`] with [`ScaleRounding::Exact`]: an exponent byte can only hold a
    /// power of two.
    pub fn new(group: Group, layout: ScaleLayout, rounding: ScaleRounding) -> Result<Self> {
        if layout == ScaleLayout::PackedUe8m0 && rounding == ScaleRounding::Exact {
            return Err(Error::Name {
                argument: "rounding",
                actual: "Exact".into(),
                expected: "PowerOfTwo (a UE8M0 scale is a power of two)",
            });
        }
        Ok(Self { group, layout, rounding })
    }

    /// Values per scale.
    #[must_use]
    pub fn group(self) -> Group {
        self.group
    }

    /// Where scales stand.
    #[must_use]
    pub fn layout(self) -> ScaleLayout {
        self.layout
    }

    /// Which values they take.
    #[must_use]
    pub fn rounding(self) -> ScaleRounding {
        self.rounding
    }

    /// `ceil(H / group)`.
    ///
    /// # Errors
    /// [`Error::Value`] unless `hidden` is a positive multiple of [`Group::smallest`].
    pub fn groups(self, hidden: usize) -> Result<usize> {
        let (group, smallest) = (self.group.size(), self.group.smallest());
        if hidden == 0 || !hidden.is_multiple_of(smallest) {
            let half = if smallest < group {
                format!(": groups of {group}, the last one half at least")
            } else {
                String::new()
            };
            return Err(Error::value("hidden", hidden, format!("a positive multiple of {smallest}{half}")));
        }
        Ok(hidden.div_ceil(group))
    }

    /// The matrix that the scales of `[m_sum, hidden]` are.
    ///
    /// # Errors
    /// As [`ScaleFormat::groups`]; [`Error::Overflow`].
    pub fn matrix(self, m_sum: usize, hidden: usize) -> Result<ScaleMatrix> {
        let columns = self.groups(hidden)?.div_ceil(self.layout.groups_per_word());
        let (row_stride, column_stride) = match self.layout.column_multiple() {
            None => (columns, 1),
            Some(multiple) => (1, crate::plan::round_up(m_sum, multiple)?),
        };
        Ok(ScaleMatrix { rows: m_sum, columns, row_stride, column_stride })
    }

    /// 4-byte words that the scales of `[m_sum, hidden]` take, padding included.
    ///
    /// # Errors
    /// As [`ScaleFormat::groups`]; [`Error::Overflow`].
    pub fn words(self, m_sum: usize, hidden: usize) -> Result<usize> {
        self.matrix(m_sum, hidden)?.words()
    }

    /// The word that holds the scale of `[row, group]` in a buffer of `m_sum` rows, `groups` to a row.
    #[must_use]
    #[inline]
    pub fn word(self, row: usize, group: usize, m_sum: usize, groups: usize) -> usize {
        match self.layout {
            ScaleLayout::RowMajor => row * groups + group,
            ScaleLayout::MnMajor => row + group * m_sum.next_multiple_of(COLUMN_MULTIPLE),
            ScaleLayout::PackedUe8m0 => row + group / 4 * m_sum.next_multiple_of(COLUMN_MULTIPLE),
        }
    }
}

/// The scale of a group whose largest magnitude is `amax` (which must not be NaN).
#[must_use]
#[inline(always)]
pub fn scale_of(amax: f32, rounding: ScaleRounding) -> f32 {
    let floored = if amax > AMAX_FLOOR { amax } else { AMAX_FLOOR };
    let scale = floored * (1.0 / E4m3::MAX);
    match rounding {
        ScaleRounding::Exact => scale,
        ScaleRounding::PowerOfTwo => round_up_to_power_of_two(scale),
    }
}

/// The smallest power of two `>= scale`, for a positive normal (or infinite) `scale`.
#[inline(always)]
fn round_up_to_power_of_two(scale: f32) -> f32 {
    const MANTISSA: u32 = (1 << 23) - 1;
    // Adding all mantissa bits carries into the exponent unless the mantissa is zero.
    f32::from_bits((scale.to_bits() + MANTISSA) & !MANTISSA)
}

/// The UE8M0 byte of a power of two: `log2(scale) + 127`, and 255 (NaN) for infinity.
#[must_use]
#[inline(always)]
pub fn ue8m0_byte(scale: f32) -> u8 {
    (scale.to_bits() >> 23) as u8
}

/// The value of a UE8M0 byte: `2^(byte - 127)`; 255 is NaN.
#[must_use]
#[inline]
pub fn ue8m0_value(byte: u8) -> f32 {
    match byte {
        0 => f32::from_bits(1 << 22),
        255 => f32::NAN,
        exponent => f32::from_bits(u32::from(exponent) << 23),
    }
}

/// `x` in units of `scale`.
#[must_use]
#[inline(always)]
pub fn quantize_value(x: f32, scale: f32) -> E4m3 {
    E4m3::from_f32(x / scale)
}

/// Quantizes weights `values [N, K]` to e4m3 `bytes [N, K]` with a scale for each block of 128 x 128,
/// `scales [ceil(N / 128), ceil(K / 128)]`: `amax * (1/448)` over the block, as for a row's group.
///
/// # Errors
/// [`Error::Shape`] unless there are exactly as many values, bytes and scales.
pub fn quantize_blocks(values: &[f32], n: usize, k: usize, bytes: &mut [E4m3], scales: &mut [f32]) -> Result<()> {
    let [rows, cols] = [n, k].map(|extent| extent.div_ceil(WEIGHT_BLOCK));
    require_exact("values", values.len(), &[n, k])?;
    require_exact("bytes", bytes.len(), &[n, k])?;
    require_exact("scales", scales.len(), &[rows, cols])?;
    for (block, scale) in scales.iter_mut().enumerate() {
        let (first_row, first_col) = (block / cols * WEIGHT_BLOCK, block % cols * WEIGHT_BLOCK);
        let places = || {
            let columns = first_col..k.min(first_col + WEIGHT_BLOCK);
            (first_row..n.min(first_row + WEIGHT_BLOCK)).map(move |row| row * k + columns.start..row * k + columns.end)
        };
        let amax = places().flat_map(|place| &values[place]).fold(0f32, |most, value| most.max(value.abs()));
        *scale = scale_of(amax, ScaleRounding::Exact);
        for place in places() {
            for (byte, &value) in bytes[place.clone()].iter_mut().zip(&values[place]) {
                *byte = quantize_value(value, *scale);
            }
        }
    }
    Ok(())
}

/// Scales to read: words, and the format that says what they are.
#[derive(Debug, Clone, Copy)]
pub struct Scales<'a> {
    format: ScaleFormat,
    words: Words<&'a [f32], &'a [i32]>,
}

/// Scales to write: words, and the format that says what they are.
#[derive(Debug)]
pub struct ScalesMut<'a> {
    format: ScaleFormat,
    words: Words<&'a mut [f32], &'a mut [i32]>,
}

/// f32 words, for [`ScaleLayout::RowMajor`] and [`ScaleLayout::MnMajor`], or packed words of exponent bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Words<F, P> {
    F32(F),
    Ue8m0(P),
}

impl<'a> Scales<'a> {
    /// f32 words. A function that takes the value refuses a format of other words.
    #[must_use]
    pub fn f32(format: ScaleFormat, words: &'a [f32]) -> Self {
        Self { format, words: Words::F32(words) }
    }

    /// Words of four UE8M0 bytes each, for [`ScaleLayout::PackedUe8m0`].
    #[must_use]
    pub fn ue8m0(format: ScaleFormat, words: &'a [i32]) -> Self {
        Self { format, words: Words::Ue8m0(words) }
    }

    /// Their format.
    #[must_use]
    pub fn format(&self) -> ScaleFormat {
        self.format
    }

    /// Fails unless these scales are of their format's word type and long enough for `[m_sum, hidden]`.
    pub(crate) fn check(&self, argument: &'static str, m_sum: usize, hidden: usize) -> Result<()> {
        let (len, packed) = match self.words {
            Words::F32(words) => (words.len(), false),
            Words::Ue8m0(words) => (words.len(), true),
        };
        check_scales(argument, self.format, len, packed, m_sum, hidden)
    }

    /// The scale of `[row, group]` among `[m_sum, groups]` as f32; panics outside the buffer.
    #[must_use]
    pub fn value(&self, row: usize, group: usize, m_sum: usize, groups: usize) -> f32 {
        let word = self.format.word(row, group, m_sum, groups);
        match self.words {
            Words::F32(words) => words[word],
            Words::Ue8m0(words) => ue8m0_value((words[word] as u32 >> (group % 4 * 8)) as u8),
        }
    }
}

impl<'a> ScalesMut<'a> {
    /// f32 words. A function that takes the value refuses a format of other words.
    #[must_use]
    pub fn f32(format: ScaleFormat, words: &'a mut [f32]) -> Self {
        Self { format, words: Words::F32(words) }
    }

    /// Words of four UE8M0 bytes each, for [`ScaleLayout::PackedUe8m0`].
    #[must_use]
    pub fn ue8m0(format: ScaleFormat, words: &'a mut [i32]) -> Self {
        Self { format, words: Words::Ue8m0(words) }
    }

    /// Their format.
    #[must_use]
    pub fn format(&self) -> ScaleFormat {
        self.format
    }

    /// The same, for a part of the time.
    pub fn reborrow(&mut self) -> ScalesMut<'_> {
        let words = match &mut self.words {
            Words::F32(words) => Words::F32(&mut **words),
            Words::Ue8m0(words) => Words::Ue8m0(&mut **words),
        };
        ScalesMut { format: self.format, words }
    }

    pub(crate) fn into_words(self) -> Words<&'a mut [f32], &'a mut [i32]> {
        self.words
    }

    pub(crate) fn check(&self, argument: &'static str, m_sum: usize, hidden: usize) -> Result<()> {
        let (len, packed) = match &self.words {
            Words::F32(words) => (words.len(), false),
            Words::Ue8m0(words) => (words.len(), true),
        };
        check_scales(argument, self.format, len, packed, m_sum, hidden)
    }
}

fn check_scales(
    argument: &'static str,
    format: ScaleFormat,
    len: usize,
    packed: bool,
    m_sum: usize,
    hidden: usize,
) -> Result<()> {
    use crate::dtype::Dtype;
    match (packed, format.layout == ScaleLayout::PackedUe8m0) {
        (true, false) => {
            return Err(Error::Dtype {
                argument,
                actual: Dtype::I32,
                expected: "f32 for row-major and MN-major scales",
            });
        }
        (false, true) => {
            return Err(Error::Dtype { argument, actual: Dtype::F32, expected: "i32 for packed UE8M0 scales" });
        }
        _ => {}
    }
    crate::error::require_len(argument, len, format.words(m_sum, hidden)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_round_up_to_powers_of_two_exactly() {
        for exponent in -30..90 {
            let power = 2f32.powi(exponent);
            assert_eq!(round_up_to_power_of_two(power), power);
            assert_eq!(round_up_to_power_of_two(power.next_up()), 2.0 * power);
            assert_eq!(round_up_to_power_of_two(power.next_down()), power);
            assert_eq!(ue8m0_value(ue8m0_byte(power)), power);
        }
        assert_eq!(ue8m0_byte(round_up_to_power_of_two(f32::INFINITY)), 255);
        assert_eq!(ue8m0_value(0), 2f32.powi(-127));
    }

    #[test]
    fn amax_has_a_floor_and_infinity_passes_through() {
        assert_eq!(scale_of(0.0, ScaleRounding::Exact), 1e-10 * (1.0 / 448.0));
        assert_eq!(scale_of(f32::INFINITY, ScaleRounding::Exact), f32::INFINITY);
        assert!(quantize_value(f32::INFINITY, f32::INFINITY).is_nan());
        assert_eq!(quantize_value(5.0, f32::INFINITY).0, 0);
    }

    #[test]
    fn formats_that_cannot_be_are_errors() {
        let error = ScaleFormat::new(Group::G32, ScaleLayout::PackedUe8m0, ScaleRounding::Exact).unwrap_err();
        assert!(matches!(error, Error::Name { argument: "rounding", .. }), "{error}");
        assert!(matches!(Group::from_size(64), Err(Error::Value { argument: "group", actual: 64, .. })));
        assert_eq!(ScaleFormat::HOPPER.groups(192), Ok(2));
        let error = ScaleFormat::HOPPER.groups(160).unwrap_err();
        assert!(
            error.to_string().starts_with("hidden is 160, expected a positive multiple of 64: groups of 128"),
            "{error}"
        );
        let error = ScalesMut::f32(ScaleFormat::HOPPER, &mut [0.0; 7]).check("scales", 5, 128).unwrap_err();
        assert_eq!(error, Error::BufferTooSmall { argument: "scales", actual: 7, needed: 8 });
        let error = ScalesMut::ue8m0(ScaleFormat::HOPPER, &mut [0; 8]).check("scales", 5, 128).unwrap_err();
        assert!(matches!(error, Error::Dtype { argument: "scales", .. }), "{error}");
    }
}
