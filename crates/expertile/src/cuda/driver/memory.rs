//! Device memory: typed addresses, and buffers that know their length and device.
//!
//! Every copy here goes through the default stream and waits. The default stream waits for the streams that programs
//! create without asking for the contrary, and they for it.

use super::check_call;
use super::device::Device;
use super::stream::Stream;
use crate::error::{Error, Result, checked_add, checked_mul, require_len};
use bytemuck::{NoUninit, Pod};
use cudarc::driver::sys;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::marker::PhantomData;

/// An address in device memory of `T`s; of bytes, where a configuration says what they are.
///
/// Plain data, as frameworks hand it out: it owns nothing and keeps nothing alive. It is null only where there is no
/// element. What may be absent is an `Option`.
#[repr(transparent)]
pub struct DevicePtr<T = u8> {
    address: u64,
    element: PhantomData<fn() -> T>,
}

impl<T> DevicePtr<T> {
    /// The address as an integer.
    #[must_use]
    pub const fn new(address: u64) -> Self {
        Self { address, element: PhantomData }
    }

    /// As an integer.
    #[must_use]
    pub const fn address(self) -> u64 {
        self.address
    }

    /// The same address, of another type.
    #[must_use]
    pub const fn cast<U>(self) -> DevicePtr<U> {
        DevicePtr::new(self.address)
    }

    /// The address so many bytes further on.
    #[must_use]
    pub const fn byte_add(self, bytes: usize) -> Self {
        Self::new(self.address + bytes as u64)
    }

    /// Fails unless the address is there and a multiple of `alignment`.
    pub(in crate::cuda) fn require_aligned(self, argument: &'static str, alignment: u64) -> Result<()> {
        if self.address == 0 || !self.address.is_multiple_of(alignment) {
            return Err(Error::Value {
                argument,
                actual: i128::from(self.address),
                expected: format!("a device address that is a multiple of {alignment}"),
            });
        }
        Ok(())
    }

    /// [`DevicePtr::require_aligned`] of an address that a call cannot do without.
    pub(in crate::cuda) fn require(pointer: Option<Self>, argument: &'static str, alignment: u64) -> Result<()> {
        pointer.unwrap_or_default().require_aligned(argument, alignment)
    }

    /// How the kernels take an address that may be absent: as zero.
    pub(in crate::cuda) fn or_null(pointer: Option<Self>) -> u64 {
        pointer.map_or(0, Self::address)
    }
}

// Not derived: a derive would ask the same of `T`.
impl<T> Clone for DevicePtr<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for DevicePtr<T> {}

impl<T> PartialEq for DevicePtr<T> {
    fn eq(&self, other: &Self) -> bool {
        self.address == other.address
    }
}

impl<T> Eq for DevicePtr<T> {}

impl<T> Hash for DevicePtr<T> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.address.hash(state);
    }
}

impl<T> Default for DevicePtr<T> {
    /// Null.
    fn default() -> Self {
        Self::new(0)
    }
}

impl<T> fmt::Debug for DevicePtr<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.address)
    }
}

/// `len` values in device memory, freed with the buffer.
///
/// Methods take `&self`: device memory is not the host's, and everything here and in the safe calls of this backend is
/// ordered by the default stream.
pub struct DeviceBuffer<T = u8> {
    memory: Memory,
    len: usize,
    element: PhantomData<fn() -> T>,
}

/// An allocation.
struct Memory {
    device: Device,
    address: u64,
}

impl<T> fmt::Debug for DeviceBuffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Memory { device, address } = &self.memory;
        let (len, element, ordinal) = (self.len, std::any::type_name::<T>(), device.info().ordinal);
        write!(f, "DeviceBuffer({len} x {element} at {address:#x} of device {ordinal})")
    }
}

impl<T> DeviceBuffer<T> {
    /// Where it is.
    #[must_use]
    pub fn ptr(&self) -> DevicePtr<T> {
        DevicePtr::new(self.memory.address)
    }

    /// Its device.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.memory.device
    }

    /// Elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds no element.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }

    /// The same memory as bytes.
    #[must_use]
    pub fn into_bytes(self) -> DeviceBuffer<u8> {
        DeviceBuffer { len: self.bytes(), memory: self.memory, element: PhantomData }
    }

    /// Fails unless the buffer is on that device and holds at least `needed` elements.
    pub(in crate::cuda) fn require(&self, argument: &'static str, device: &Device, needed: usize) -> Result<()> {
        let (here, expected) = (self.memory.device.info().ordinal, device.info().ordinal);
        if here != expected {
            return Err(Error::Device {
                argument,
                actual: format!("on device {here}"),
                expected: format!("on device {expected}, the layer's"),
            });
        }
        require_len(argument, self.len, needed)
    }

    /// Fills the buffer with one byte, after everything queued on the default stream, and waits.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    #[allow(unsafe_code)]
    pub fn fill(&self, byte: u8) -> Result<()> {
        let _current = self.memory.device.current()?;
        // SAFETY: the whole buffer, and stream 0 always lives.
        unsafe {
            let filled = sys::cuMemsetD8Async(self.memory.address, byte, self.bytes(), std::ptr::null_mut());
            check_call("cuMemsetD8Async", filled)?;
            check_call("cuStreamSynchronize", sys::cuStreamSynchronize(std::ptr::null_mut()))
        }
    }

    /// Copies values from the host to the bytes from `start` on.
    #[allow(unsafe_code)]
    fn copy_in(&self, start: usize, from: &[u8]) -> Result<()> {
        require_len("buffer", self.bytes(), checked_add("end", start, from.len())?)?;
        let _current = self.memory.device.current()?;
        // SAFETY: both sides hold that many bytes, and stream 0 always lives. The copy may return when all has left the
        // host; a stream of the caller's own does not wait for the rest, so this call does.
        unsafe {
            let copied = sys::cuMemcpyHtoD_v2(self.memory.address + start as u64, from.as_ptr().cast(), from.len());
            check_call("cuMemcpyHtoD", copied)?;
            check_call("cuStreamSynchronize", sys::cuStreamSynchronize(std::ptr::null_mut()))
        }
    }

    #[allow(unsafe_code)]
    fn copy_out(&self, start: usize, to: &mut [u8]) -> Result<()> {
        require_len("buffer", self.bytes(), checked_add("end", start, to.len())?)?;
        // SAFETY: the buffer is that large, and stream 0 always lives.
        unsafe { self.memory.device.read(Stream(0), DevicePtr::new(self.memory.address).byte_add(start), to) }
    }
}

impl<T: NoUninit> DeviceBuffer<T> {
    /// Copies from the host to the start of the buffer, and waits.
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`], [`Error::Cuda`].
    pub fn upload(&self, from: &[T]) -> Result<()> {
        self.copy_in(0, bytemuck::cast_slice(from))
    }

    /// Copies from the host to the elements from `first` on, and waits.
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`], [`Error::Cuda`].
    pub fn upload_from(&self, first: usize, from: &[T]) -> Result<()> {
        self.copy_in(checked_mul("first", first, size_of::<T>())?, bytemuck::cast_slice(from))
    }
}

impl<T: Pod> DeviceBuffer<T> {
    /// Copies the start of the buffer to the host, after everything queued on the default stream.
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`], [`Error::Cuda`].
    pub fn download(&self, to: &mut [T]) -> Result<()> {
        self.copy_out(0, bytemuck::cast_slice_mut(to))
    }
}

impl DeviceBuffer<u8> {
    /// Copies values of any type to the bytes from `start` on, and waits.
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`], [`Error::Cuda`].
    pub fn upload_at<U: NoUninit>(&self, start: usize, from: &[U]) -> Result<()> {
        self.copy_in(start, bytemuck::cast_slice(from))
    }

    /// Copies the bytes from `start` on to values of any type, after everything queued on the default stream.
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`], [`Error::Cuda`].
    pub fn download_at<U: Pod>(&self, start: usize, to: &mut [U]) -> Result<()> {
        self.copy_out(start, bytemuck::cast_slice_mut(to))
    }
}

impl Drop for Memory {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        if let Ok(_current) = self.device.current() {
            // SAFETY: allocated once, freed once; the driver waits for queued work first. A failure here was reported
            // where it happened.
            unsafe { sys::cuMemFree_v2(self.address) };
        }
    }
}

impl Device {
    /// Device memory for `len` values, whatever is in it. The steps never allocate.
    ///
    /// # Errors
    /// [`Error::Overflow`]; [`Error::Cuda`] if there is not enough.
    #[allow(unsafe_code)]
    pub fn allocate<T: Pod>(&self, len: usize) -> Result<DeviceBuffer<T>> {
        let bytes = checked_mul("bytes of a buffer", len, size_of::<T>())?;
        let mut address = 0;
        let _current = self.current()?;
        // SAFETY: the pointer is valid for the call; freed when the buffer is dropped.
        check_call("cuMemAlloc", unsafe { sys::cuMemAlloc_v2(&mut address, bytes.max(1)) })?;
        Ok(DeviceBuffer { memory: Memory { device: self.clone(), address }, len, element: PhantomData })
    }

    /// A buffer of these values.
    ///
    /// # Errors
    /// As [`Device::allocate`].
    pub fn upload<T: Pod>(&self, values: &[T]) -> Result<DeviceBuffer<T>> {
        let buffer = self.allocate(values.len())?;
        buffer.upload(values)?;
        Ok(buffer)
    }

    /// Queues zeros.
    ///
    /// # Safety
    /// `address` is device memory of at least `bytes` bytes that nobody else uses when the stream comes to it.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    #[allow(unsafe_code)]
    pub unsafe fn zero(&self, stream: Stream, address: DevicePtr, bytes: usize) -> Result<()> {
        let _current = self.current()?;
        // SAFETY: the caller's promise.
        check_call("cuMemsetD8Async", unsafe { sys::cuMemsetD8Async(address.address(), 0, bytes, stream.raw()) })
    }

    /// Whether what is queued on the stream goes into a graph, where memory cannot be allocated by the driver.
    ///
    /// # Safety
    /// `stream` is a live stream of this device (or 0).
    ///
    /// # Errors
    /// [`Error::Cuda`].
    #[allow(unsafe_code)]
    pub unsafe fn is_capturing(&self, stream: Stream) -> Result<bool> {
        let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        let _current = self.current()?;
        // SAFETY: the caller's promise; the pointer is valid for the call.
        check_call("cuStreamIsCapturing", unsafe { sys::cuStreamIsCapturing(stream.raw(), &mut status) })?;
        Ok(status != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
    }

    /// Waits for everything queued on the stream.
    ///
    /// # Safety
    /// `stream` is a live stream of this device (or 0).
    ///
    /// # Errors
    /// [`Error::Cuda`], also for what failed since the last wait.
    #[allow(unsafe_code)]
    pub unsafe fn synchronize(&self, stream: Stream) -> Result<()> {
        let _current = self.current()?;
        // SAFETY: the caller's promise.
        check_call("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(stream.raw()) })
    }

    /// Waits for the stream, then reads device memory.
    ///
    /// # Safety
    /// `address` is device memory of at least `to.len()` bytes, `stream` a live stream of this device (or 0).
    #[allow(unsafe_code)]
    pub(in crate::cuda) unsafe fn read(&self, stream: Stream, address: DevicePtr, to: &mut [u8]) -> Result<()> {
        let _current = self.current()?;
        // SAFETY: the caller's promise; `to` is valid for the call, which returns only once it is filled.
        unsafe {
            let copied = sys::cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), address.address(), to.len(), stream.raw());
            check_call("cuMemcpyDtoHAsync", copied)?;
            check_call("cuStreamSynchronize", sys::cuStreamSynchronize(stream.raw()))
        }
    }

    /// Queues a copy of the whole of `from` to the start of `to`.
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`], [`Error::Cuda`].
    #[allow(unsafe_code)]
    pub(in crate::cuda) fn copy(&self, stream: Stream, from: &DeviceBuffer<u8>, to: &DeviceBuffer<u8>) -> Result<()> {
        crate::error::require_len("to", to.bytes(), from.bytes())?;
        let _current = self.current()?;
        // SAFETY: both buffers hold that many bytes; the driver keeps freed memory until queued work is done with it.
        let result =
            unsafe { sys::cuMemcpyDtoDAsync_v2(to.memory.address, from.memory.address, from.bytes(), stream.raw()) };
        check_call("cuMemcpyDtoDAsync", result)
    }
}
