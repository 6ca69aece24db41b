//! torch's tensors and streams, asked for through the table of C functions that torch offers other libraries (DLPack's
//! exchange API): a tensor is read without a Python object being made. A torch without the table is asked in Python.
//!
//! Written by hand: of the table, one function per tensor and one per call are needed. The crate for it (dlpark 0.10)
//! asks for the stream with every tensor, not without one, and its table cannot be kept for the life of the process.

use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyCapsule, PyType};
use std::ffi::{c_int, c_void};
use std::ptr::{NonNull, null_mut};

/// The version of the table that is understood; a minor one only adds.
const MAJOR: u32 = 1;
const CPU: i32 = 1;
const CUDA: i32 = 2;
/// CPU memory that a GPU can reach.
const PINNED: i32 = 3;

/// DLPack's `DLTensor`.
#[repr(C)]
struct DlTensor {
    data: *mut c_void,
    device_type: i32,
    device_id: i32,
    dimensions: i32,
    code: u8,
    bits: u8,
    lanes: u16,
    shape: *const i64,
    strides: *const i64,
    byte_offset: u64,
}

/// DLPack's `DLPackExchangeAPI`. Functions that are not called here have no type here.
#[repr(C)]
struct Table {
    major: u32,
    minor: u32,
    older: *const c_void,
    allocate: *const c_void,
    to_managed: *const c_void,
    from_managed: *const c_void,
    view: Option<unsafe extern "C" fn(*mut ffi::PyObject, *mut DlTensor) -> c_int>,
    stream: Option<unsafe extern "C" fn(i32, i32, *mut *mut c_void) -> c_int>,
}

/// What torch said about a tensor. It lasts as long as the tensor is not resized, so it is copied at once.
pub(crate) struct View<'a> {
    pub(crate) pointer: usize,
    pub(crate) shape: &'a [i64],
    pub(crate) strides: &'a [i64],
    /// DLPack's type code, bits and lanes.
    pub(crate) dtype: (u8, u8, u16),
    /// The CUDA device, or the CPU.
    pub(crate) device: Option<usize>,
}

/// The table, and the classes whose instances it reads: torch's own two, as others may hide what they are.
struct Exchange {
    classes: [Py<PyType>; 2],
    table: NonNull<Table>,
}

#[allow(unsafe_code)]
// SAFETY: torch's table is constant and lives as long as the process.
unsafe impl Send for Exchange {}
#[allow(unsafe_code)]
// SAFETY: as above.
unsafe impl Sync for Exchange {}

static EXCHANGE: PyOnceLock<Option<Exchange>> = PyOnceLock::new();

/// Looks for the table of the torch that a tensor has come from.
pub(crate) fn find(py: Python<'_>) -> PyResult<()> {
    EXCHANGE.get_or_try_init(py, || Exchange::of_torch(py)).map(drop)
}

/// What `read` makes of a tensor that torch can describe; `None` for anything else, and before [`find`].
pub(crate) fn view<R>(object: &Bound<'_, PyAny>, read: impl FnOnce(View<'_>) -> R) -> Option<R> {
    let exchange = EXCHANGE.get(object.py())?.as_ref()?;
    let class = object.get_type_ptr();
    if !exchange.classes.iter().any(|known| std::ptr::eq(known.as_ptr(), class.cast())) {
        return None;
    }
    let mut tensor = DlTensor {
        data: null_mut(),
        device_type: 0,
        device_id: 0,
        dimensions: 0,
        code: 0,
        bits: 0,
        lanes: 0,
        shape: std::ptr::null(),
        strides: std::ptr::null(),
        byte_offset: 0,
    };
    let function = exchange.table().view?;
    #[allow(unsafe_code)]
    // SAFETY: the interpreter lock is held, the object is of a class the table is for, and the pointer is valid.
    if unsafe { function(object.as_ptr(), &mut tensor) } != 0 {
        drop(PyErr::take(object.py()));
        return None;
    }
    let device = match tensor.device_type {
        CPU | PINNED => None,
        CUDA => Some(usize::try_from(tensor.device_id).ok()?),
        _ => return None,
    };
    let dimensions = usize::try_from(tensor.dimensions).ok()?;
    if dimensions > 0 && (tensor.shape.is_null() || tensor.strides.is_null()) {
        return None;
    }
    let list = |first: *const i64| match dimensions {
        0 => [].as_slice(),
        #[allow(unsafe_code)]
        // SAFETY: not null, and of as many numbers as there are dimensions, by DLPack; nobody else runs until `read` is
        // done.
        _ => unsafe { std::slice::from_raw_parts(first, dimensions) },
    };
    Some(read(View {
        pointer: tensor.data as usize + tensor.byte_offset as usize,
        shape: list(tensor.shape),
        strides: list(tensor.strides),
        dtype: (tensor.code, tensor.bits, tensor.lanes),
        device,
    }))
}

/// The stream that torch's own operators would use now; `None` where the table does not say.
pub(crate) fn current_stream(py: Python<'_>, ordinal: usize) -> Option<u64> {
    let function = EXCHANGE.get(py)?.as_ref()?.table().stream?;
    let mut stream = null_mut();
    let ordinal = i32::try_from(ordinal).ok()?;
    #[allow(unsafe_code)]
    // SAFETY: the interpreter lock is held and the pointer is valid for the call.
    if unsafe { function(CUDA, ordinal, &mut stream) } != 0 {
        drop(PyErr::take(py));
        return None;
    }
    Some(stream as usize as u64)
}

impl Exchange {
    fn of_torch(py: Python<'_>) -> PyResult<Option<Self>> {
        const NAME: &std::ffi::CStr = c"dlpack_exchange_api";
        let torch = py.import("torch")?;
        let tensor = torch.getattr("Tensor")?.cast_into::<PyType>()?;
        let parameter = torch.getattr("nn")?.getattr("Parameter")?.cast_into::<PyType>()?;
        let Some(capsule) = tensor.getattr_opt("__dlpack_c_exchange_api__")? else { return Ok(None) };
        let Ok(capsule) = capsule.cast_into::<PyCapsule>() else { return Ok(None) };
        let table = capsule.pointer_checked(Some(NAME))?.cast::<Table>();
        #[allow(unsafe_code)]
        // SAFETY: a capsule of that name points to a table; whatever its version, it starts with the major number.
        let major = unsafe { table.cast::<u32>().read() };
        Ok((major == MAJOR).then(|| Self { classes: [tensor.unbind(), parameter.unbind()], table }))
    }

    fn table(&self) -> &Table {
        #[allow(unsafe_code)]
        // SAFETY: a table of this major version, which `of_torch` has checked.
        unsafe {
            self.table.as_ref()
        }
    }
}
