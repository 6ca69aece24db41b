//! NCCL's C interface: found at run time, and never unloaded (its threads and its memory outlive every communicator).

use crate::error::{Error, Result};
use libloading::Library;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// 2.18: every function and every rule used here is in it.
const OLDEST: i32 = 21_800;
/// From here on NCCL's numbers of data types may be others.
const UNKNOWN: i32 = 30_000;
/// `ncclUint8`.
const BYTES: c_int = 1;

/// `ncclUniqueId`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct UniqueId(pub(super) [u8; 128]);

/// `ncclComm_t`.
pub(super) type Communicator = *mut c_void;
type Stream = *mut c_void;

/// NCCL's functions.
pub(super) struct Functions {
    pub(super) path: PathBuf,
    pub(super) version: i32,
    get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> c_int,
    init_rank: unsafe extern "C" fn(*mut Communicator, c_int, UniqueId, c_int) -> c_int,
    destroy: unsafe extern "C" fn(Communicator) -> c_int,
    abort: unsafe extern "C" fn(Communicator) -> c_int,
    async_error: unsafe extern "C" fn(Communicator, *mut c_int) -> c_int,
    all_gather: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, Communicator, Stream) -> c_int,
    send: unsafe extern "C" fn(*const c_void, usize, c_int, c_int, Communicator, Stream) -> c_int,
    receive: unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, Communicator, Stream) -> c_int,
    memory: Option<MemoryFunctions>,
    group_start: unsafe extern "C" fn() -> c_int,
    group_end: unsafe extern "C" fn() -> c_int,
    describe: unsafe extern "C" fn(c_int) -> *const c_char,
    _library: ManuallyDrop<Library>,
}

/// Memory that other ranks' GPUs reach, and buffers that NCCL knows: from 2.27 on.
struct MemoryFunctions {
    allocate: unsafe extern "C" fn(*mut *mut c_void, usize) -> c_int,
    free: unsafe extern "C" fn(*mut c_void) -> c_int,
    register: unsafe extern "C" fn(Communicator, *mut c_void, usize, *mut *mut c_void, c_int) -> c_int,
    deregister: unsafe extern "C" fn(Communicator, *mut c_void) -> c_int,
}

impl MemoryFunctions {
    /// # Safety
    /// The library is NCCL.
    #[allow(unsafe_code)]
    unsafe fn find(library: &Library) -> Option<Self> {
        // SAFETY: the types are those of nccl.h.
        unsafe {
            Some(Self {
                allocate: *library.get(c"ncclMemAlloc").ok()?,
                free: *library.get(c"ncclMemFree").ok()?,
                register: *library.get(c"ncclCommWindowRegister").ok()?,
                deregister: *library.get(c"ncclCommWindowDeregister").ok()?,
            })
        }
    }
}

impl std::fmt::Debug for Functions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "NCCL {} of {}", version_text(self.version), self.path.display())
    }
}

/// What this process has loaded: one NCCL, for ever.
static LOADED: Mutex<Option<&'static Functions>> = Mutex::new(None);

fn device(actual: String, expected: impl Into<String>) -> Error {
    Error::Device { argument: "NCCL", actual, expected: expected.into() }
}

/// `2.28.9` of 22809.
pub(super) fn version_text(version: i32) -> String {
    format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
}

impl Functions {
    /// The library that the environment names, or the first of the usual places that has one.
    pub(super) fn find() -> Result<&'static Self> {
        let candidates = candidates();
        let mut tried = Vec::new();
        for path in &candidates {
            match Self::load(path) {
                Ok(functions) => return Ok(functions),
                Err(error) if path.components().count() > 1 && path.exists() => return Err(error),
                Err(_) => tried.push(path.display().to_string()),
            }
        }
        let expected = format!(
            "the library (pip install nvidia-nccl-cu13, which PyTorch brings, or its path in EXPERTILE_NCCL) as one of {}",
            tried.join(", ")
        );
        Err(device("not found".into(), expected))
    }

    /// The library of that file, or of that name. A process has one: with another loaded already, it is that one.
    pub(super) fn load(path: &Path) -> Result<&'static Self> {
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(functions) = *loaded {
            if functions.path == path {
                return Ok(functions);
            }
            return Err(device(path.display().to_string(), format!("{}, which is loaded", functions.path.display())));
        }
        let functions: &'static Self = Box::leak(Box::new(Self::open(path)?));
        *loaded = Some(functions);
        Ok(functions)
    }

    #[allow(unsafe_code)]
    fn open(path: &Path) -> Result<Self> {
        let failed = |error: libloading::Error| device(format!("{} ({error})", path.display()), "an NCCL library");
        // SAFETY: loading NCCL runs its initialisers, which is what it is for. It is never unloaded.
        let library = ManuallyDrop::new(unsafe { Library::new(path) }.map_err(failed)?);
        let mut version = 0;
        // SAFETY: the types are those of nccl.h, unchanged since version 2.7.
        let functions = unsafe {
            let get_version: unsafe extern "C" fn(*mut c_int) -> c_int =
                *library.get(c"ncclGetVersion").map_err(failed)?;
            get_version(&mut version);
            Self {
                path: path.to_owned(),
                version,
                get_unique_id: *library.get(c"ncclGetUniqueId").map_err(failed)?,
                init_rank: *library.get(c"ncclCommInitRank").map_err(failed)?,
                destroy: *library.get(c"ncclCommDestroy").map_err(failed)?,
                abort: *library.get(c"ncclCommAbort").map_err(failed)?,
                async_error: *library.get(c"ncclCommGetAsyncError").map_err(failed)?,
                all_gather: *library.get(c"ncclAllGather").map_err(failed)?,
                send: *library.get(c"ncclSend").map_err(failed)?,
                receive: *library.get(c"ncclRecv").map_err(failed)?,
                memory: MemoryFunctions::find(&library),
                group_start: *library.get(c"ncclGroupStart").map_err(failed)?,
                group_end: *library.get(c"ncclGroupEnd").map_err(failed)?,
                describe: *library.get(c"ncclGetErrorString").map_err(failed)?,
                _library: library,
            }
        };
        if !(OLDEST..UNKNOWN).contains(&version) {
            let expected = format!("{} or later, below {}", version_text(OLDEST), version_text(UNKNOWN));
            return Err(device(format!("version {} ({})", version_text(version), path.display()), expected));
        }
        Ok(functions)
    }

    #[allow(unsafe_code)]
    fn check(&self, call: &'static str, code: c_int) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: the text is static in the library, which is never unloaded.
        let message = unsafe { CStr::from_ptr((self.describe)(code)) }.to_string_lossy().into_owned();
        Err(Error::Nccl { call, code, message })
    }

    #[allow(unsafe_code)]
    pub(super) fn unique_id(&self) -> Result<UniqueId> {
        let mut id = UniqueId([0; 128]);
        // SAFETY: the pointer is valid for the call.
        self.check("ncclGetUniqueId", unsafe { (self.get_unique_id)(&mut id) })?;
        Ok(id)
    }

    /// Waits until all ranks have come. The device's context is current on this thread.
    #[allow(unsafe_code)]
    pub(super) fn init_rank(&self, ranks: usize, id: UniqueId, rank: usize) -> Result<Communicator> {
        let mut communicator = std::ptr::null_mut();
        // SAFETY: the pointer is valid for the call; ranks are few.
        let made = unsafe { (self.init_rank)(&mut communicator, ranks as c_int, id, rank as c_int) };
        self.check("ncclCommInitRank", made)?;
        Ok(communicator)
    }

    /// # Safety
    /// A live communicator, which nobody uses any more.
    #[allow(unsafe_code)]
    pub(super) unsafe fn destroy(&self, communicator: Communicator) {
        // SAFETY: the caller's promise. A failure at this point concerns nobody.
        unsafe { (self.destroy)(communicator) };
    }

    /// # Safety
    /// A live communicator, which nobody uses any more.
    #[allow(unsafe_code)]
    pub(super) unsafe fn abort(&self, communicator: Communicator) {
        // SAFETY: the caller's promise.
        unsafe { (self.abort)(communicator) };
    }

    /// # Safety
    /// A live communicator.
    #[allow(unsafe_code)]
    pub(super) unsafe fn async_error(&self, communicator: Communicator) -> Result<()> {
        let mut state = 0;
        // SAFETY: the caller's promise; the pointer is valid for the call.
        unsafe {
            self.check("ncclCommGetAsyncError", (self.async_error)(communicator, &mut state))?;
        }
        self.check("ncclCommGetAsyncError", state)
    }

    /// Queues `bytes` of `from` on every rank to all of them.
    ///
    /// # Safety
    /// A live communicator and stream, and device memory that large.
    #[allow(unsafe_code)]
    pub(super) unsafe fn all_gather(
        &self,
        (communicator, stream): (Communicator, u64),
        from: u64,
        to: u64,
        bytes: usize,
    ) -> Result<()> {
        // SAFETY: the caller's promise.
        let queued = unsafe {
            (self.all_gather)(from as *const c_void, to as *mut c_void, bytes, BYTES, communicator, stream as Stream)
        };
        self.check("ncclAllGather", queued)
    }

    /// # Safety
    /// As [`Functions::all_gather`].
    #[allow(unsafe_code)]
    pub(super) unsafe fn send(
        &self,
        (communicator, stream): (Communicator, u64),
        from: u64,
        bytes: usize,
        rank: usize,
    ) -> Result<()> {
        // SAFETY: the caller's promise.
        let queued =
            unsafe { (self.send)(from as *const c_void, bytes, BYTES, rank as c_int, communicator, stream as Stream) };
        self.check("ncclSend", queued)
    }

    /// # Safety
    /// As [`Functions::all_gather`].
    #[allow(unsafe_code)]
    pub(super) unsafe fn receive(
        &self,
        (communicator, stream): (Communicator, u64),
        to: u64,
        bytes: usize,
        rank: usize,
    ) -> Result<()> {
        // SAFETY: the caller's promise.
        let queued =
            unsafe { (self.receive)(to as *mut c_void, bytes, BYTES, rank as c_int, communicator, stream as Stream) };
        self.check("ncclRecv", queued)
    }

    /// Memory of NCCL's own kind, if this version has it. The device's context is current on this thread.
    #[allow(unsafe_code)]
    pub(super) fn allocate(&self, bytes: usize) -> Result<Option<u64>> {
        let Some(memory) = &self.memory else { return Ok(None) };
        let mut address = std::ptr::null_mut();
        // SAFETY: the pointer is valid for the call.
        self.check("ncclMemAlloc", unsafe { (memory.allocate)(&mut address, bytes) })?;
        Ok(Some(address as u64))
    }

    /// # Safety
    /// An address that [`Functions::allocate`] has returned, which nobody uses any more.
    #[allow(unsafe_code)]
    pub(super) unsafe fn free(&self, address: u64) {
        if let Some(memory) = &self.memory {
            // SAFETY: the caller's promise. A failure at this point concerns nobody.
            unsafe { (memory.free)(address as *mut c_void) };
        }
    }

    /// Makes the memory known to the communicator on all ranks, which call in the same order and wait for each other.
    ///
    /// # Safety
    /// A live communicator; memory that [`Functions::allocate`] has returned.
    #[allow(unsafe_code)]
    pub(super) unsafe fn register(&self, communicator: Communicator, address: u64, bytes: usize) -> Result<u64> {
        /// `NCCL_WIN_COLL_SYMMETRIC`
        const SYMMETRIC: c_int = 1;
        let Some(memory) = &self.memory else { return Ok(0) };
        let mut window = std::ptr::null_mut();
        // SAFETY: the caller's promise; the pointer is valid for the call.
        let registered =
            unsafe { (memory.register)(communicator, address as *mut c_void, bytes, &mut window, SYMMETRIC) };
        self.check("ncclCommWindowRegister", registered)?;
        Ok(window as u64)
    }

    /// # Safety
    /// A live communicator; what [`Functions::register`] has returned for it, once.
    #[allow(unsafe_code)]
    pub(super) unsafe fn deregister(&self, communicator: Communicator, window: u64) {
        if let Some(memory) = self.memory.as_ref().filter(|_| window != 0) {
            // SAFETY: the caller's promise. A failure at this point concerns nobody.
            unsafe { (memory.deregister)(communicator, window as *mut c_void) };
        }
    }

    /// Queues all that `work` asks for as one.
    #[allow(unsafe_code)]
    pub(super) fn group(&self, work: impl FnOnce() -> Result<()>) -> Result<()> {
        // SAFETY: every start has its end, whatever happens between.
        self.check("ncclGroupStart", unsafe { (self.group_start)() })?;
        let queued = work();
        // SAFETY: as above.
        let ended = self.check("ncclGroupEnd", unsafe { (self.group_end)() });
        queued.and(ended)
    }
}

/// Where NCCL may be, best first.
fn candidates() -> Vec<PathBuf> {
    const NAME: &str = "libnccl.so.2";
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let in_folder = |path: PathBuf| if path.is_dir() { path.join(NAME) } else { path };
    let mut found: Vec<PathBuf> = variable("EXPERTILE_NCCL").map(in_folder).into_iter().collect();
    if found.is_empty() {
        found.push(PathBuf::from(NAME));
        for environment in [variable("VIRTUAL_ENV"), variable("CONDA_PREFIX")].into_iter().flatten() {
            let pythons = std::fs::read_dir(environment.join("lib")).into_iter().flatten().flatten();
            found.extend(pythons.map(|python| python.path().join("site-packages/nvidia/nccl/lib").join(NAME)));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_told_as_nccl_writes_them() {
        assert_eq!(version_text(22_809), "2.28.9");
        assert_eq!(version_text(OLDEST), "2.18.0");
    }

    #[test]
    fn what_is_no_nccl_is_named() {
        for path in ["/nowhere/libnccl.so.2", "libc.so.6"] {
            let error = Functions::open(Path::new(path)).unwrap_err();
            assert!(matches!(error, Error::Device { argument: "NCCL", .. }), "{error}");
            assert!(error.to_string().contains(path), "{error}");
        }
    }

    #[test]
    fn it_is_looked_for_by_name_where_no_variable_says_more() {
        if std::env::var_os("EXPERTILE_NCCL").is_none() {
            assert_eq!(candidates()[0], Path::new("libnccl.so.2"));
        }
    }
}
