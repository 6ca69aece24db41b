//! `topk_ids [M, topk]` out of a `.npy` or a `.safetensors` file: i32 or i64.
//!
//! Which of the two it is, the first bytes say. A `.npy` file may be in C or in Fortran order (the ids are then read
//! through strides, not moved); its numbers must be little-endian. A safetensors file holds the ids under `topk_ids`,
//! or holds nothing else.

use crate::error::{Error, Result};
use crate::read;
use crate::tensors::{Header, Tensor, little_endian};
use expertile::{MatrixRef, TopkIds};
use safetensors::Dtype;
use std::path::Path;

/// The tensor's name in a safetensors file.
pub(crate) const TOPK_IDS: &str = "topk_ids";
const NPY_MAGIC: &[u8] = b"\x93NUMPY";
/// What a pipe's npy header may take; NumPy writes less than a kilobyte.
const MOST_HEADER_BYTES: u64 = 1 << 20;
/// Tokens, and slots to a token, are counted in i32 throughout the library.
pub(crate) const MOST_ROWS: usize = i32::MAX as usize;

/// Ids that own their memory.
#[derive(Debug, Clone, PartialEq)]
pub struct Ids {
    data: IdData,
    tokens: usize,
    topk: usize,
    fortran_order: bool,
}

#[derive(Debug, Clone, PartialEq)]
enum IdData {
    I32(Vec<i32>),
    I64(Vec<i64>),
}

impl Ids {
    /// Reads a regular file, or a pipe that is open already (`/dev/stdin`, a shell's `<(command)`).
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Format`] for another kind of file, [`Error::Memory`], and as [`Ids::from_bytes`].
    pub fn open(file: &Path) -> Result<Self> {
        let bytes = read::read_argument(file, |start| needed_bytes(file, start))?;
        Self::from_bytes(file, &bytes)
    }

    /// Reads the bytes of a whole file; `file` is its name in messages.
    ///
    /// # Errors
    /// [`Error::Format`] or [`Error::Json`] for a header that cannot be, [`Error::MissingTensor`], [`Error::Dtype`] for
    /// anything but little-endian i32 or i64, [`Error::Shape`] for anything but two dimensions.
    pub fn from_bytes(file: &Path, bytes: &[u8]) -> Result<Self> {
        if bytes.starts_with(NPY_MAGIC) {
            return read_npy(file, bytes);
        }
        let header = Header::parse(file, bytes)?;
        let mut names = header.names();
        let name = match (names.next(), names.next()) {
            (Some(only), None) => only,
            _ => TOPK_IDS,
        };
        let tensor = header.tensor(bytes, name).ok_or_else(|| Error::MissingTensor {
            file: file.to_owned(),
            tensor: TOPK_IDS.into(),
            expected: "I32 or I64 [M, topk]".into(),
        })?;
        Self::from_tensor(&tensor)
    }

    pub(crate) fn from_tensor(tensor: &Tensor<'_>) -> Result<Self> {
        let data = match tensor.dtype {
            Dtype::I32 => IdData::I32(tensor.decode(i32::from_le_bytes)?),
            Dtype::I64 => IdData::I64(tensor.decode(i64::from_le_bytes)?),
            _ => return Err(tensor.wrong_dtype("I32 or I64")),
        };
        let &[tokens, topk] = tensor.shape else {
            return Err(Error::shape(tensor.file, &tensor.name, tensor.shape, "[M, topk]"));
        };
        require_bearable(tensor.file, &tensor.name, [tokens, topk])?;
        Ok(Self { data, tokens, topk, fortran_order: false })
    }

    /// `M`.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Slots per token.
    #[must_use]
    pub fn topk(&self) -> usize {
        self.topk
    }

    /// The ids as the library takes them.
    #[must_use]
    pub fn view(&self) -> TopkIds<'_> {
        match &self.data {
            IdData::I32(data) => self.matrix(data).into(),
            IdData::I64(data) => self.matrix(data).into(),
        }
    }

    fn matrix<'a, T: Copy>(&self, data: &'a [T]) -> MatrixRef<'a, T> {
        let (row_stride, col_stride) = if self.fortran_order { (1, self.tokens) } else { (self.topk, 1) };
        MatrixRef::with_strides(data, self.tokens, self.topk, row_stride, col_stride)
            .expect("the reader checked that the data holds tokens * topk values")
    }
}

/// Fails for a dimension that no routing has. Where the other one is 0, the file's length does not bound it, and
/// a loop over the tokens or slots would not end.
fn require_bearable(file: &Path, tensor: &str, shape: [usize; 2]) -> Result<()> {
    if shape.iter().any(|&extent| extent > MOST_ROWS) {
        return Err(Error::shape(file, tensor, &shape, format!("[M, topk] with both at most {MOST_ROWS}")));
    }
    Ok(())
}

/// How many bytes a file of ids has at least that starts so, as [`read::read_argument`] asks.
fn needed_bytes(file: &Path, start: &[u8]) -> Result<u64> {
    if !start.starts_with(&NPY_MAGIC[..start.len().min(NPY_MAGIC.len())]) {
        return Header::needed_bytes(file, start);
    }
    // Magic, version and the length of the header, which is in 2 bytes or in 4.
    let fixed = NPY_MAGIC.len() + 2 + if start.get(NPY_MAGIC.len()) == Some(&1) { 2 } else { 4 };
    if start.len() < fixed {
        return Ok(fixed as u64);
    }
    let length = start[NPY_MAGIC.len() + 2..fixed].iter().rev().fold(0, |length, &byte| length << 8 | u64::from(byte));
    if length > MOST_HEADER_BYTES {
        let expected = format!("at most {MOST_HEADER_BYTES} bytes");
        return Err(Error::format(file, "npy header", format!("{length} bytes"), expected));
    }
    if (start.len() as u64) < fixed as u64 + length {
        return Ok(fixed as u64 + length);
    }
    let (header, _) = split_npy(file, start)?;
    let (NpyHeader { shape, .. }, width) = parse_npy_header(file, header)?;
    let data = shape.iter().try_fold(width, |bytes, &extent| bytes.checked_mul(extent)).unwrap_or(usize::MAX);
    Ok((fixed as u64 + length).saturating_add(data as u64))
}

/// The header, and the bytes of an id.
fn parse_npy_header(file: &Path, text: &str) -> Result<(NpyHeader, usize)> {
    let header = NpyHeader::parse(text)
        .map_err(|actual| Error::format(file, "npy header", actual, "a dict of descr, fortran_order and shape"))?;
    let width = match header.descr.as_str() {
        "<i4" => 4,
        "<i8" => 8,
        _ => return Err(Error::dtype(file, TOPK_IDS, &header.descr, "<i4 or <i8 (little-endian i32 or i64)")),
    };
    Ok((header, width))
}

fn read_npy(file: &Path, bytes: &[u8]) -> Result<Ids> {
    let (text, data) = split_npy(file, bytes)?;
    let (header, width) = parse_npy_header(file, text)?;
    let &[tokens, topk] = &header.shape[..] else {
        return Err(Error::shape(file, TOPK_IDS, &header.shape, "[M, topk]"));
    };
    require_bearable(file, TOPK_IDS, [tokens, topk])?;
    let needed = tokens.checked_mul(topk).and_then(|ids| ids.checked_mul(width));
    if needed != Some(data.len()) {
        let expected = format!("{tokens} * {topk} * {width}, as the npy header says");
        return Err(Error::format(file, "length of the npy data", format!("{} bytes", data.len()), expected));
    }
    let data = match width {
        4 => little_endian(data, i32::from_le_bytes).map(IdData::I32),
        _ => little_endian(data, i64::from_le_bytes).map(IdData::I64),
    };
    let data = data.map_err(|bytes| Error::memory(file, "the ids", bytes))?;
    Ok(Ids { data, tokens, topk, fortran_order: header.fortran_order })
}

/// The header's text and the data behind it.
fn split_npy<'a>(file: &Path, bytes: &'a [u8]) -> Result<(&'a str, &'a [u8])> {
    let short = || Error::format(file, "npy header", format!("cut off at {} bytes", bytes.len()), "a whole one");
    let (version, rest) = bytes[NPY_MAGIC.len()..].split_first_chunk::<2>().ok_or_else(short)?;
    let (length, rest) = match version[0] {
        1 => {
            let (length, rest) = rest.split_first_chunk::<2>().ok_or_else(short)?;
            (usize::from(u16::from_le_bytes(*length)), rest)
        }
        2 | 3 => {
            let (length, rest) = rest.split_first_chunk::<4>().ok_or_else(short)?;
            (u32::from_le_bytes(*length) as usize, rest)
        }
        other => return Err(Error::format(file, "npy version", other.to_string(), "1, 2 or 3")),
    };
    let (text, data) = rest.split_at_checked(length).ok_or_else(short)?;
    let text = std::str::from_utf8(text)
        .map_err(|error| Error::format(file, "npy header", format!("not text ({error})"), "a Python dict"))?;
    Ok((text, data))
}

/// The three entries of a `.npy` header, a Python dict literal.
#[derive(Debug, PartialEq)]
struct NpyHeader {
    descr: String,
    fortran_order: bool,
    shape: Vec<usize>,
}

impl NpyHeader {
    /// An error is a description of what stands there instead.
    fn parse(text: &str) -> std::result::Result<Self, String> {
        let mut rest = text.trim().strip_prefix('{').ok_or("not a dict")?.trim_start();
        let (mut descr, mut fortran_order, mut shape) = (None, None, None);
        while !rest.starts_with('}') {
            let (key, after) = quoted(rest)?;
            let value = after.trim_start().strip_prefix(':').ok_or_else(|| format!("no value for {key:?}"))?;
            let value = value.trim_start();
            rest = match key {
                "descr" => take(&mut descr, quoted(value).map(|(text, rest)| (text.to_owned(), rest))?),
                "fortran_order" => take(&mut fortran_order, boolean(value)?),
                "shape" => take(&mut shape, tuple(value)?),
                _ => return Err(format!("unknown key {key:?}")),
            };
            rest = rest.trim_start();
            rest = rest.strip_prefix(',').unwrap_or(rest).trim_start();
        }
        let missing = |key: &str| format!("without {key}");
        Ok(Self {
            descr: descr.ok_or_else(|| missing("descr"))?,
            fortran_order: fortran_order.ok_or_else(|| missing("fortran_order"))?,
            shape: shape.ok_or_else(|| missing("shape"))?,
        })
    }
}

fn take<'a, T>(slot: &mut Option<T>, (value, rest): (T, &'a str)) -> &'a str {
    *slot = Some(value);
    rest
}

fn quoted(text: &str) -> std::result::Result<(&str, &str), String> {
    let quote = text.chars().next().filter(|c| matches!(c, '\'' | '"')).ok_or("a value that is not a quoted name")?;
    text[1..].split_once(quote).ok_or_else(|| "an open quote".into())
}

fn boolean(text: &str) -> std::result::Result<(bool, &str), String> {
    let named = |name, value| text.strip_prefix(name).map(|rest| (value, rest));
    named("True", true).or_else(|| named("False", false)).ok_or_else(|| "fortran_order that is not a bool".into())
}

fn tuple(text: &str) -> std::result::Result<(Vec<usize>, &str), String> {
    let inner = text.strip_prefix('(').ok_or("a shape that is not a tuple")?;
    let (inner, rest) = inner.split_once(')').ok_or("an open shape")?;
    let number = |part: &str| part.trim().parse().map_err(|_| format!("a dimension {:?}", part.trim()));
    let parts = inner.split(',').filter(|part| !part.trim().is_empty());
    Ok((parts.map(number).collect::<std::result::Result<_, _>>()?, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn npy(header: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
        bytes.extend((header.len() as u16).to_le_bytes());
        bytes.extend(header.as_bytes());
        bytes.extend(data);
        bytes
    }

    fn read(bytes: &[u8]) -> Result<Ids> {
        Ids::from_bytes(Path::new("ids"), bytes)
    }

    fn listed(ids: &Ids) -> Vec<i64> {
        let view = ids.view();
        (0..view.tokens()).flat_map(|token| (0..view.topk()).map(move |slot| view.get(token, slot))).collect()
    }

    #[test]
    fn npy_in_c_and_fortran_order_give_the_same_ids() {
        let c: Vec<u8> = [1i32, 2, 3, -1, 5, 6].iter().flat_map(|id| id.to_le_bytes()).collect();
        let ids = read(&npy("{'descr': '<i4', 'fortran_order': False, 'shape': (3, 2), }   \n", &c)).unwrap();
        assert_eq!((ids.tokens(), ids.topk(), listed(&ids)), (3, 2, vec![1, 2, 3, -1, 5, 6]));
        let fortran: Vec<u8> = [1i64, 3, 5, 2, -1, 6].iter().flat_map(|id| id.to_le_bytes()).collect();
        let ids = read(&npy("{\"descr\":\"<i8\",\"fortran_order\":True,\"shape\":(3,2)}", &fortran)).unwrap();
        assert_eq!(listed(&ids), [1, 2, 3, -1, 5, 6]);
        let mut second = b"\x93NUMPY\x02\x00\x38\x00\x00\x00".to_vec();
        second.extend(format!("{:56}", "{'descr': '<i4', 'fortran_order': False, 'shape': (3,2)}").as_bytes());
        second.extend(&c);
        assert_eq!(listed(&read(&second).unwrap()), [1, 2, 3, -1, 5, 6]);
    }

    #[test]
    fn no_tokens_are_no_ids() {
        for (order, shape) in [("False", "(0, 8)"), ("True", "(0, 8)"), ("False", "(5, 0)")] {
            let header = format!("{{'descr': '<i8', 'fortran_order': {order}, 'shape': {shape}}}");
            assert!(listed(&read(&npy(&header, &[])).unwrap()).is_empty());
        }
    }

    #[test]
    fn bad_npy_headers_are_named() {
        let refuse = |header: &str, data: &[u8], part: &str| {
            let error = read(&npy(header, data)).unwrap_err().to_string();
            assert!(error.contains(part), "{header}: {error}");
        };
        refuse("", &[], "npy header is not a dict");
        refuse("{", &[], "not a quoted name");
        refuse("{'descr", &[], "an open quote");
        refuse("{'descr' '<i4'}", &[], "no value for \"descr\"");
        refuse("{'descr': '<i4', 'fortran_order': False}", &[], "without shape");
        refuse("{'descr': [('a', '<i4')], 'fortran_order': False, 'shape': (1,)}", &[], "not a quoted name");
        refuse("{'descr': '<i4', 'fortran_order': 0, 'shape': (1,)}", &[], "not a bool");
        refuse("{'descr': '<i4', 'fortran_order': True, 'shape': (1, -2)}", &[], "a dimension \"-2\"");
        refuse("{'descr': '<i4', 'fortran_order': True, 'shape': (1, 2", &[], "an open shape");
        refuse("{'descr': '<i4', 'x': 1}", &[], "unknown key \"x\"");
        refuse("{'descr': '>i4', 'fortran_order': False, 'shape': (1, 1)}", &[0; 4], "dtype >i4, expected <i4 or <i8");
        refuse("{'descr': '<f4', 'fortran_order': False, 'shape': (1, 1)}", &[0; 4], "dtype <f4");
        refuse("{'descr': '<i4', 'fortran_order': False, 'shape': (4,)}", &[0; 16], "shape [4], expected [M, topk]");
        refuse("{'descr': '<i4', 'fortran_order': False, 'shape': (2, 2)}", &[0; 15], "npy data is 15 bytes");
        for (order, shape) in
            [("False", "(0, 2147483648)"), ("True", "(0, 1000000000000)"), ("False", "(4294967296, 0)")]
        {
            let header = format!("{{'descr': '<i4', 'fortran_order': {order}, 'shape': {shape}}}");
            refuse(&header, &[], "expected [M, topk] with both at most 2147483647");
        }
        let huge = format!("{{'descr': '<i8', 'fortran_order': False, 'shape': (0, {})}}", usize::MAX);
        refuse(&huge, &[], "shape [0, 18446744073709551615], expected [M, topk] with both at most 2147483647");
        refuse(
            "{'descr': '<i8', 'fortran_order': False, 'shape': (2147483647, 2147483647)}",
            &[],
            "npy data is 0 bytes",
        );
    }

    #[test]
    fn the_bytes_that_a_file_needs_are_known_from_its_header() {
        let whole = npy("{'descr': '<i4', 'fortran_order': False, 'shape': (3, 2), }", &[7; 24]);
        let needed = |start: &[u8]| needed_bytes(Path::new("x"), start).unwrap() as usize;
        let data = whole.len() - 24;
        for start in 0..data {
            assert!(needed(&whole[..start]) > start && needed(&whole[..start]) <= data, "{start}");
        }
        assert_eq!((needed(&whole[..data]), needed(&whole)), (whole.len(), whole.len()));
        let endless = needed_bytes(Path::new("x"), b"\x93NUMPY\x02\x00\xff\xff\xff\xff").unwrap_err().to_string();
        assert!(endless.contains("npy header is 4294967295 bytes, expected at most 1048576 bytes"), "{endless}");
    }

    #[test]
    fn cut_off_npy_files_are_errors() {
        let whole = npy("{'descr': '<i4', 'fortran_order': False, 'shape': (1, 1), }", &7i32.to_le_bytes());
        assert!(read(&whole).is_ok());
        for length in 0..whole.len() {
            assert!(read(&whole[..length]).is_err(), "{length}");
        }
        assert!(read(b"\x93NUMPY\x09\x00aa").unwrap_err().to_string().contains("npy version is 9"));
    }

    #[test]
    fn safetensors_hold_the_ids_by_name_or_alone() {
        let file = |tensors: &[(&str, Dtype, &[usize], &[u8])]| {
            let views = tensors.iter().map(|&(name, dtype, shape, bytes)| {
                (name, safetensors::tensor::TensorView::new(dtype, shape.to_vec(), bytes).unwrap())
            });
            safetensors::serialize(views, None).unwrap()
        };
        let ids: Vec<u8> = [4i64, -1].iter().flat_map(|id| id.to_le_bytes()).collect();
        let alone = read(&file(&[("anything", Dtype::I64, &[1, 2], &ids)])).unwrap();
        assert_eq!(listed(&alone), [4, -1]);
        let named = read(&file(&[("a", Dtype::U8, &[1], &[0]), ("topk_ids", Dtype::I64, &[2, 1], &ids)])).unwrap();
        assert_eq!((named.tokens(), listed(&named)), (2, vec![4, -1]));
        let refuse = |bytes: &[u8], part: &str| {
            let error = read(bytes).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        };
        refuse(&file(&[("a", Dtype::U8, &[1], &[0]), ("b", Dtype::U8, &[1], &[0])]), "tensor topk_ids is missing");
        refuse(&file(&[("topk_ids", Dtype::F32, &[2, 2], &ids)]), "dtype F32, expected I32 or I64");
        refuse(&file(&[("topk_ids", Dtype::I64, &[2], &ids)]), "shape [2], expected [M, topk]");
    }
}
