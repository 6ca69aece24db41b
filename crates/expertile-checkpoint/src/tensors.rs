//! The tensors of one safetensors file, over its bytes.
//!
//! The header is checked once (its length, its JSON, that the tensors cover the data exactly and in order); from then
//! on a tensor's bytes are there and have the length that its shape and dtype say.

use crate::error::{Error, Result};
use crate::json;
use bytemuck::Pod;
use expertile::quantize::ue8m0_value;
use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use std::borrow::Cow;
use std::path::{Path, PathBuf};

const LENGTH_BYTES: usize = 8;
const HEADER: &str = "safetensors header";
/// The format's own limit, so that a hostile length does not make the JSON parser work through gigabytes.
const MAX_HEADER_BYTES: usize = 100_000_000;

/// A parsed header: what is where.
#[derive(Debug)]
pub(crate) struct Header {
    file: PathBuf,
    metadata: Metadata,
    /// In the order of their data.
    names: Vec<String>,
    data_start: usize,
}

/// One tensor: name, shape, dtype, bytes.
#[derive(Debug)]
pub(crate) struct Tensor<'a> {
    pub(crate) file: &'a Path,
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: &'a [usize],
    pub(crate) bytes: &'a [u8],
}

impl Header {
    /// Parses the header of `bytes`, a whole file; `file` is its name in messages.
    pub(crate) fn parse(file: &Path, bytes: &[u8]) -> Result<Self> {
        json::refuse_lfs_pointer(file, "kind of file", bytes)?;
        let Some((length, rest)) = bytes.split_first_chunk::<LENGTH_BYTES>() else {
            return Err(Error::format(
                file,
                "length",
                format!("{} bytes", bytes.len()),
                "a safetensors file of at least 8",
            ));
        };
        let length = u64::from_le_bytes(*length);
        let limit = rest.len().min(MAX_HEADER_BYTES);
        let length = usize::try_from(length).ok().filter(|&length| length <= limit).ok_or_else(|| {
            Error::format(file, "header length", length.to_string(), format!("at most {limit} (of {})", rest.len()))
        })?;
        let (header, data) = rest.split_at(length);
        // Not `SafeTensors::deserialize`: its check that the tensors end where the file ends adds without checking, and
        // a hostile header can make that sum overflow.
        json::refuse_duplicate_keys(file, HEADER, header)?;
        let metadata: Metadata = serde_json::from_slice(header).map_err(|source| Error::json(file, HEADER, source))?;
        if metadata.data_len() != data.len() {
            return Err(Error::format(
                file,
                "length of the tensors' data",
                format!("{} bytes", data.len()),
                format!("{}, as the header says", metadata.data_len()),
            ));
        }
        let names = metadata.offset_keys();
        Ok(Self { file: file.to_owned(), metadata, names, data_start: LENGTH_BYTES + length })
    }

    /// How many bytes a file has at least that starts so, as [`read::read_argument`](crate::read::read_argument) asks.
    pub(crate) fn needed_bytes(file: &Path, start: &[u8]) -> Result<u64> {
        let Some((length, rest)) = start.split_first_chunk::<LENGTH_BYTES>() else { return Ok(LENGTH_BYTES as u64) };
        let length = u64::from_le_bytes(*length);
        if length > MAX_HEADER_BYTES as u64 {
            let expected = format!("at most {MAX_HEADER_BYTES}");
            return Err(Error::format(file, "header length", length.to_string(), expected));
        }
        let Some(header) = rest.get(..length as usize) else { return Ok(LENGTH_BYTES as u64 + length) };
        let metadata: Metadata = serde_json::from_slice(header).map_err(|source| Error::json(file, HEADER, source))?;
        Ok((LENGTH_BYTES as u64 + length).saturating_add(metadata.data_len() as u64))
    }

    pub(crate) fn file(&self) -> &Path {
        &self.file
    }

    /// Names of all tensors, in no particular order.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.names.iter().map(String::as_str)
    }

    /// Whether there is a tensor of that name.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.metadata.info(name).is_some()
    }

    /// The tensor of that name, if there is one; `bytes` is the file that was parsed.
    pub(crate) fn tensor<'a>(&'a self, bytes: &'a [u8], name: &str) -> Option<Tensor<'a>> {
        let info = self.metadata.info(name)?;
        let (start, end) = info.data_offsets;
        let bytes = &bytes[self.data_start..][start..end];
        Some(Tensor { file: &self.file, name: name.to_owned(), dtype: info.dtype, shape: &info.shape, bytes })
    }
}

impl<'a> Tensor<'a> {
    /// Fails unless the shape is this one.
    pub(crate) fn require_shape(&self, shape: &[usize]) -> Result<()> {
        if self.shape != shape {
            return Err(Error::shape(self.file, &self.name, self.shape, format!("{shape:?}")));
        }
        Ok(())
    }

    pub(crate) fn wrong_dtype(&self, expected: impl Into<String>) -> Error {
        Error::dtype(self.file, &self.name, self.dtype, expected)
    }

    /// The values, of `N` little-endian bytes each.
    pub(crate) fn decode<const N: usize, T>(&self, decode: impl Fn([u8; N]) -> T) -> Result<Vec<T>> {
        little_endian(self.bytes, decode)
            .map_err(|bytes| Error::memory(self.file, format!("tensor {}", self.name), bytes))
    }

    /// A bf16, f16, f32 or e8m0 (`2^(byte - 127)`, 255 is NaN) tensor, widened.
    pub(crate) fn to_f32(&self) -> Result<Vec<f32>> {
        match self.dtype {
            Dtype::F32 => self.decode(f32::from_le_bytes),
            Dtype::BF16 => self.decode(|bytes| bf16::from_le_bytes(bytes).to_f32()),
            Dtype::F16 => self.decode(|bytes| f16::from_le_bytes(bytes).to_f32()),
            Dtype::F8_E8M0 => self.decode(|[byte]| ue8m0_value(byte)),
            _ => Err(self.wrong_dtype("BF16, F16, F32 or F8_E8M0")),
        }
    }

    /// Values of `N` bytes each among the tensor's `bytes`, in place, or copied where the file did not align them (or
    /// the machine is big-endian).
    pub(crate) fn values<const N: usize, T: Pod>(
        &self,
        bytes: &'a [u8],
        decode: impl Fn([u8; N]) -> T,
    ) -> Result<Cow<'a, [T]>> {
        borrow_or_decode(bytes, decode)
            .map_err(|bytes| Error::memory(self.file, format!("tensor {}", self.name), bytes))
    }
}

/// Values of `N` little-endian bytes each; the error is the number of bytes for which there is no memory.
pub(crate) fn little_endian<const N: usize, T>(
    bytes: &[u8],
    decode: impl Fn([u8; N]) -> T,
) -> std::result::Result<Vec<T>, u64> {
    let chunks = bytes.as_chunks::<N>().0;
    let mut values = Vec::new();
    values.try_reserve_exact(chunks.len()).map_err(|_| (chunks.len() as u64).saturating_mul(size_of::<T>() as u64))?;
    values.extend(chunks.iter().map(|&chunk| decode(chunk)));
    Ok(values)
}

fn borrow_or_decode<const N: usize, T: Pod>(
    bytes: &[u8],
    decode: impl Fn([u8; N]) -> T,
) -> std::result::Result<Cow<'_, [T]>, u64> {
    match bytemuck::try_cast_slice(bytes) {
        Ok(values) if cfg!(target_endian = "little") => Ok(Cow::Borrowed(values)),
        _ => little_endian(bytes, decode).map(Cow::Owned),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.resize(bytes.len() + data, 1);
        bytes
    }

    fn refuse(bytes: &[u8]) -> String {
        let error = Header::parse(Path::new("x.safetensors"), bytes).unwrap_err();
        match std::error::Error::source(&error) {
            Some(source) => format!("{error}: {source}"),
            None => error.to_string(),
        }
    }

    #[test]
    fn truncated_and_lying_headers_are_errors() {
        assert!(refuse(b"1234567").contains("length is 7 bytes"));
        assert!(refuse(&100u64.to_le_bytes()).contains("header length is 100, expected at most 0"));
        assert!(refuse(&u64::MAX.to_le_bytes()).contains("header length is 18446744073709551615"));
        assert!(refuse(&file("{", 0)).contains("safetensors header is not valid"));
        assert!(refuse(&file("\u{0}", 0)).contains("safetensors header is not valid"));
        let two = r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}"#;
        assert!(Header::parse(Path::new("x"), &file(two, 2)).is_ok());
        assert!(refuse(&file(two, 1)).contains("tensors' data is 1 bytes, expected 2"));
        assert!(refuse(&file(two, 3)).contains("tensors' data is 3 bytes, expected 2"));
        let gap = r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}"#;
        assert!(refuse(&file(gap, 3)).contains("safetensors header is not valid"));
        let lie = r#"{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,2]}}"#;
        assert!(refuse(&file(lie, 2)).contains("safetensors header is not valid"));
    }

    #[test]
    fn a_name_or_an_entry_that_stands_twice_is_an_error() {
        let one = r#"{"dtype":"U8","shape":[2],"data_offsets":[0,2]}"#;
        let twice = refuse(&file(&format!(r#"{{"a":{one},"a":{one}}}"#), 2));
        assert!(twice.contains("safetensors header is not valid: key \"a\" stands twice"), "{twice}");
        let twice = refuse(&file(r#"{"a":{"dtype":"U8","shape":[2],"shape":[2],"data_offsets":[0,2]}}"#, 2));
        assert!(twice.contains("key \"shape\" stands twice"), "{twice}");
        let twice = refuse(&file(&format!(r#"{{"__metadata__":{{"k":"1","k":"2"}},"a":{one}}}"#), 2));
        assert!(twice.contains("key \"k\" stands twice"), "{twice}");
    }

    #[test]
    fn a_pointer_of_git_lfs_is_called_one() {
        let pointer = refuse(b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n");
        assert!(pointer.contains("is a Git LFS pointer, expected the file itself"), "{pointer}");
    }

    #[test]
    fn the_bytes_that_a_file_needs_are_known_from_its_header() {
        let whole = file(r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}"#, 2);
        let needed = |start: &[u8]| Header::needed_bytes(Path::new("x"), start).unwrap();
        assert_eq!((needed(&[]), needed(&whole[..7])), (8, 8));
        for start in 8..whole.len() - 2 {
            assert_eq!(needed(&whole[..start]), whole.len() as u64 - 2);
        }
        assert_eq!((needed(&whole[..whole.len() - 2]), needed(&whole)), (whole.len() as u64, whole.len() as u64));
        assert!(Header::needed_bytes(Path::new("x"), b"y\ny\ny\ny\n").is_err());
    }

    #[test]
    fn tensors_whose_lengths_add_up_past_the_address_space_are_an_error() {
        let step = (1u64 << 61) - 1;
        let tensors: Vec<String> = (0..8)
            .map(|i| {
                let (start, end) = (i * step, (i + 1) * step);
                format!(r#""{i}":{{"dtype":"U8","shape":[{step}],"data_offsets":[{start},{end}]}}"#)
            })
            .collect();
        let header = format!("{{{}}}", tensors.join(","));
        assert!(refuse(&file(&header, 0)).contains("expected 18446744073709551608"), "{}", refuse(&file(&header, 0)));
    }

    #[test]
    fn values_are_the_same_aligned_or_not() {
        let values: Vec<bf16> = (0..9).map(|i| bf16::from_f32(i as f32 - 3.5)).collect();
        let mut bytes = [0u8; 19];
        for shift in 0..2 {
            for (value, slot) in values.iter().zip(bytes[shift..].as_chunks_mut::<2>().0) {
                *slot = value.to_le_bytes();
            }
            let read: Cow<'_, [bf16]> = borrow_or_decode(&bytes[shift..shift + 18], bf16::from_le_bytes).unwrap();
            assert_eq!(read, values);
        }
    }
}
