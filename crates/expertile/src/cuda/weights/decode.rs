//! A copy of arranged MXFP4 weights in e4m3: twice the memory, and nothing left to decode for a GEMM of many rows.

use super::mxfp4::Arranged;
use super::{Weights, part_bytes};
#[cfg(doc)]
use crate::cuda::LayerChoice;
use crate::cuda::arguments::require_int;
use crate::cuda::driver::{Device, DeviceBuffer, DevicePtr, Resident, Source, Stream};
use crate::error::{Error, Result};
use crate::gemm::{ActivationFormat, WEIGHT_BLOCK, WeightFormat};
use std::sync::Arc;

/// Four units of 128 threads.
const THREADS: u32 = 512;

/// Exponents that the largest group of a block may have, with the bias of 127. A sum of products then is at least
/// 2^-126 whether or not it has been multiplied by them, and rounds likewise: e4m3's smallest product is 2^-15, the
/// smallest scale of a row 2^-42, and the block's scale 6 powers of two below its exponent.
const EXPONENTS: [u8; 2] = [127 - 40, 127 + 40];

/// The kernel's `DecodeArgs`.
#[repr(C)]
struct Arguments {
    packed: u64,
    exponents: u64,
    spread: u64,
    values: u64,
    scales: u64,
    report: u64,
    experts: i32,
    n: i32,
    k: i32,
    reserved: i32,
}

impl Weights {
    /// mxfp4 weights that are [arranged](Weights::arrange) for e4m3 rows, with a copy in e4m3: 8 bits a weight beside
    /// 4.25. A layer's calls of many tokens, where decoding takes longer than reading twice the bytes, multiply by the
    /// copy ([`LayerChoice::e4m3_copy`]).
    ///
    /// The copy has the same numbers: each block of 128 x 128 has the power of two of its largest group as its scale. A
    /// row has the bits that it has without (as long as no sum passes f32's range before it is scaled).
    ///
    /// Waits until the copy is made.
    ///
    /// # Errors
    /// [`Error::WeightFormat`] unless these are mxfp4 weights arranged for e4m3 rows; [`Error::Value`] where scales are
    /// too far apart: more than 11 powers of two in an output or in a block of 128 x 128, groups of zeros left out, or
    /// beyond 2^-40 to 2^40; [`Error::Kernel`], [`Error::Cuda`].
    #[allow(unsafe_code)]
    pub fn with_e4m3_copy(self, device: &Device) -> Result<Self> {
        self.require_copyable()?;
        let memory: DeviceBuffer = device.allocate(Self::e4m3_copy_bytes((self.experts, self.n, self.k))?)?;
        // SAFETY: the memory is that large, new, and the copy's own from now on.
        let mut weights = unsafe { self.with_e4m3_copy_in(device, Stream(0), memory.ptr()) }?;
        let copy = weights.e4m3_copy.as_deref().cloned();
        weights.e4m3_copy = copy.map(|copy| Arc::new(Self { _memory: Arc::from([memory]), ..copy }));
        Ok(weights)
    }

    /// Bytes of the copy in e4m3 of `[E, N, K]`.
    ///
    /// # Errors
    /// As [`Weights::arranged_bytes`].
    pub fn e4m3_copy_bytes(sizes: (usize, usize, usize)) -> Result<usize> {
        Self::arranged_bytes(WeightFormat::Mxfp4, sizes)?;
        let (values, scales) = part_bytes(WeightFormat::E4m3, sizes);
        Ok(values + scales)
    }

    /// As [`Weights::with_e4m3_copy`], in the caller's memory: [`Weights::e4m3_copy_bytes`], on 128 bytes. Waits for the
    /// stream.
    ///
    /// # Safety
    /// As [`Weights::arrange_in`].
    ///
    /// # Errors
    /// As [`Weights::with_e4m3_copy`]; [`Error::Value`] unless the memory is aligned.
    #[allow(unsafe_code)]
    pub unsafe fn with_e4m3_copy_in(self, device: &Device, stream: Stream, memory: DevicePtr) -> Result<Self> {
        let arranged = self.require_copyable()?;
        memory.require_aligned("memory", 128)?;
        let Self { experts, n, k, .. } = self;
        let scales = memory.byte_add(part_bytes(WeightFormat::E4m3, (experts, n, k)).0);
        let report = device.upload(&[0u32])?;
        let arguments = Arguments {
            packed: self.values.address(),
            exponents: DevicePtr::or_null(arranged.exponents),
            spread: DevicePtr::or_null(arranged.spread),
            values: memory.address(),
            scales: scales.address(),
            report: report.ptr().address(),
            experts: require_int("experts", experts)?,
            n: require_int("n", n)?,
            k: require_int("k", k)?,
            reserved: 0,
        };
        let kernel = Resident::prepare(device, &source(), c"decode", THREADS)?;
        let mut word = [0u32];
        // SAFETY: the kernel takes one `DecodeArgs`; the memory is as large as it writes, by the caller's promise, and the
        // report lives until it has come, for which the host waits. The weights' memory is the promise of who made the
        // value, or this value's.
        unsafe {
            kernel.launch(stream, &arguments)?;
            device.read(stream, report.ptr().cast(), bytemuck::cast_slice_mut(&mut word))?;
        }
        if word[0] != 0 {
            return Err(not_exact(!word[0] as usize, (n, k)));
        }
        let copy = Self::new(WeightFormat::E4m3, (experts, n, k), memory, Some(scales), Arc::from([]));
        Ok(Self { e4m3_copy: Some(Arc::new(copy)), ..self })
    }

    /// The copy in e4m3, where there is one.
    #[must_use]
    pub fn e4m3_copy(&self) -> Option<&Self> {
        self.e4m3_copy.as_deref()
    }

    /// What a GEMM reads: the copy, if it is to and there is one.
    pub(in crate::cuda) fn read_by(&self, from_copy: bool) -> &Self {
        self.e4m3_copy().filter(|_| from_copy).unwrap_or(self)
    }

    fn require_copyable(&self) -> Result<Arranged> {
        let arranged = self.require_arranged(ActivationFormat::E4m3)?;
        arranged.filter(|_| self.format == WeightFormat::Mxfp4).copied().ok_or(Error::WeightFormat {
            argument: "weights",
            actual: self.format.name(),
            expected: "mxfp4",
        })
    }
}

/// Says which block of 128 x 128 has no exact copy.
fn not_exact(block: usize, (n, k): (usize, usize)) -> Error {
    let [rows, cols] = [n, k].map(|extent| extent.div_ceil(WEIGHT_BLOCK));
    let [least, most] = EXPONENTS.map(|exponent| i32::from(exponent) - 127);
    let expected = format!(
        "one whose mxfp4 scales are at most 11 powers of two apart in every output and in every block of 128 x 128, and \
         from 2^{least} to 2^{most}, for a copy in e4m3: those of outputs {} and inputs {} on are not",
        block / cols % rows * WEIGHT_BLOCK,
        block % cols * WEIGHT_BLOCK
    );
    Error::value("expert", block / (rows * cols), expected)
}

/// The source of the kernel that decodes.
pub(in crate::cuda) fn source() -> Source {
    let [least, most] = EXPONENTS.map(i64::from);
    let definitions =
        vec![("HOST_THREADS", i64::from(THREADS)), ("HOST_INT4", 0), ("HOST_LEAST", least), ("HOST_MOST", most)];
    Source::new("decode_mxfp4.cu", include_str!("../kernels/gemm/decode_mxfp4.cu"), definitions)
}
