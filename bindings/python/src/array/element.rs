//! Element types, by the names of torch, NumPy and DLPack.

use bytemuck::Pod;
use expertile::E4m3;
use half::{bf16, f16};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;

/// What an array is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Element {
    E4m3,
    /// A power of two, `2^(byte - 127)`.
    E8m0,
    Bf16,
    F16,
    F32,
    I32,
    I64,
    U8,
    I8,
    /// Anything else: no operation takes it, and its error says its name.
    Other,
}

impl Element {
    /// Names as torch and NumPy (with ml_dtypes) spell them.
    const NAMED: [(&'static str, Self); 9] = [
        ("float8_e4m3fn", Self::E4m3),
        ("float8_e8m0fnu", Self::E8m0),
        ("bfloat16", Self::Bf16),
        ("float16", Self::F16),
        ("float32", Self::F32),
        ("int32", Self::I32),
        ("int64", Self::I64),
        ("uint8", Self::U8),
        ("int8", Self::I8),
    ];

    /// Its size; `None` if that has to be asked.
    pub(super) fn bytes(self) -> Option<usize> {
        match self {
            Self::E4m3 | Self::E8m0 | Self::U8 | Self::I8 => Some(1),
            Self::Bf16 | Self::F16 => Some(2),
            Self::F32 | Self::I32 => Some(4),
            Self::I64 => Some(8),
            Self::Other => None,
        }
    }

    /// By DLPack's type code, bits and lanes.
    pub(super) fn exchanged(dtype: (u8, u8, u16)) -> Self {
        const INT: u8 = 0;
        const UINT: u8 = 1;
        const FLOAT: u8 = 2;
        const BFLOAT: u8 = 4;
        const E4M3FN: u8 = 10;
        const E8M0FNU: u8 = 14;
        match dtype {
            (E4M3FN, 8, 1) => Self::E4m3,
            (E8M0FNU, 8, 1) => Self::E8m0,
            (BFLOAT, 16, 1) => Self::Bf16,
            (FLOAT, 16, 1) => Self::F16,
            (FLOAT, 32, 1) => Self::F32,
            (INT, 32, 1) => Self::I32,
            (INT, 64, 1) => Self::I64,
            (UINT, 8, 1) => Self::U8,
            (INT, 8, 1) => Self::I8,
            _ => Self::Other,
        }
    }

    /// Of one of torch's dtypes.
    pub(crate) fn of_torch(dtype: &Bound<'_, PyAny>) -> PyResult<Self> {
        torch_element(dtype)
    }

    /// Its name; empty for anything else.
    pub(crate) fn name(self) -> &'static str {
        Self::NAMED.iter().find(|&&(_, element)| element == self).map_or("", |&(name, _)| name)
    }

    pub(super) fn named(name: &str) -> Self {
        Self::NAMED.iter().find(|(known, _)| *known == name).map_or(Self::Other, |&(_, element)| element)
    }
}

/// A Rust type that arrays of some elements may be read and written as.
pub(crate) trait Native: Pod {
    /// Whether an array of `element` is made of these.
    fn is(element: Element) -> bool;
}

macro_rules! native {
    ($($type:ty: $($element:ident)|+;)+) => {
        $(impl Native for $type {
            fn is(element: Element) -> bool {
                matches!(element, $(Element::$element)|+)
            }
        })+
    };
}

native! {
    // NumPy has no e4m3 of its own: bytes are taken for it.
    E4m3: E4m3 | U8 | I8;
    u8: U8 | I8 | E4m3 | E8m0;
    bf16: Bf16;
    f16: F16;
    f32: F32;
    i32: I32;
    i64: I64;
}

/// torch's dtypes and the elements they stand for. torch never frees a dtype, so comparing addresses identifies it.
fn torch_dtypes(py: Python<'_>) -> PyResult<&'static [(Py<PyAny>, Element)]> {
    static DTYPES: PyOnceLock<Vec<(Py<PyAny>, Element)>> = PyOnceLock::new();
    let known = DTYPES.get_or_try_init(py, || {
        let torch = py.import("torch")?;
        let known = Element::NAMED.iter().map(|&(name, element)| Ok((torch.getattr(name)?.unbind(), element)));
        known.collect::<PyResult<_>>()
    })?;
    Ok(known)
}

pub(super) fn torch_element(dtype: &Bound<'_, PyAny>) -> PyResult<Element> {
    let known = torch_dtypes(dtype.py())?;
    Ok(known.iter().find(|(known, _)| known.is(dtype)).map_or(Element::Other, |&(_, element)| element))
}

/// torch's dtype for an element.
pub(crate) fn torch_dtype(py: Python<'_>, element: Element) -> PyResult<Bound<'_, PyAny>> {
    let known = torch_dtypes(py)?.iter().find(|&&(_, known)| known == element);
    let (dtype, _) = known.ok_or_else(|| PyTypeError::new_err("no dtype of torch stands for the elements"))?;
    Ok(dtype.bind(py).clone())
}
