//! The C interface of an MPI library, found at run time.
//!
//! There are three ABIs: MPI 5.0's standard one (`libmpi_abi.so.1`), Open MPI's and MPICH's (which Intel MPI and
//! MVAPICH share). They differ in what a handle is (a pointer, or an `int`) and in the values of constants; the
//! functions used here are the same in all three. A handle is kept as a `usize`: an `int` passes in the low half of a
//! register as it would alone, and is read from the low half of the word that a function has written it to, on the
//! little-endian machines that this is built for.

use crate::error::{Error, Result};
use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

#[cfg(not(target_endian = "little"))]
compile_error!("the feature `mpi` is written for little-endian machines: see exchange/mpi/library.rs");

type Handle = usize;

/// The constants in which ABIs differ.
#[derive(Debug, Clone, Copy)]
struct Constants {
    world: Handle,
    byte: Handle,
    errors_return: Handle,
    serialized: c_int,
}

/// An MPI library. Loaded once and never unloaded: MPI keeps threads and handlers of its own.
pub(super) struct Library {
    path: PathBuf,
    name: String,
    constants: Constants,
    init_thread: unsafe extern "C" fn(*mut c_int, *mut *mut *mut c_char, c_int, *mut c_int) -> c_int,
    initialized: unsafe extern "C" fn(*mut c_int) -> c_int,
    finalized: unsafe extern "C" fn(*mut c_int) -> c_int,
    finalize: unsafe extern "C" fn() -> c_int,
    query_thread: unsafe extern "C" fn(*mut c_int) -> c_int,
    comm_rank: unsafe extern "C" fn(Handle, *mut c_int) -> c_int,
    comm_size: unsafe extern "C" fn(Handle, *mut c_int) -> c_int,
    comm_dup: unsafe extern "C" fn(Handle, *mut Handle) -> c_int,
    comm_set_errhandler: unsafe extern "C" fn(Handle, Handle) -> c_int,
    isend: unsafe extern "C" fn(*const c_void, c_int, Handle, c_int, c_int, Handle, *mut Handle) -> c_int,
    irecv: unsafe extern "C" fn(*mut c_void, c_int, Handle, c_int, c_int, Handle, *mut Handle) -> c_int,
    test: unsafe extern "C" fn(*mut Handle, *mut c_int, *mut Status) -> c_int,
    get_count: unsafe extern "C" fn(*const Status, Handle, *mut c_int) -> c_int,
    error_string: unsafe extern "C" fn(c_int, *mut c_char, *mut c_int) -> c_int,
}

impl std::fmt::Debug for Library {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.name, self.path.display())
    }
}

/// What MPI says of a message: 20 to 32 bytes, by ABI.
#[repr(C, align(16))]
pub(super) struct Status([u8; 64]);

/// A message under way: a handle, which MPI gets by value or by the address of the moment.
#[derive(Debug)]
pub(super) struct Request(Handle);

impl Request {
    pub(super) fn none() -> Self {
        Self(0)
    }
}

/// What this process has started.
struct Process {
    library: Option<&'static Library>,
    /// Values of [`Communicator`] that live.
    communicators: usize,
    /// Whether MPI was started here, and not by the program.
    started: bool,
    /// Whether something went wrong, so that ending MPI in an orderly way would wait for ever.
    abandoned: bool,
}

static PROCESS: Mutex<Process> =
    Mutex::new(Process { library: None, communicators: 0, started: false, abandoned: false });

fn process() -> std::sync::MutexGuard<'static, Process> {
    PROCESS.lock().unwrap_or_else(PoisonError::into_inner)
}

static CALLS: Mutex<()> = Mutex::new(());

/// Runs `work` while no other exchange of this process is in MPI.
pub(super) fn one_at_a_time<T>(work: impl FnOnce() -> T) -> T {
    let _alone = CALLS.lock().unwrap_or_else(PoisonError::into_inner);
    work()
}

fn device(actual: String, expected: impl Into<String>) -> Error {
    Error::Device { argument: "MPI", actual, expected: expected.into() }
}

impl Library {
    /// The library that the environment names, that of the launcher, or the first there is.
    pub(super) fn find() -> Result<&'static Self> {
        if let Some(path) = std::env::var_os("EXPERTILE_MPI") {
            return Self::load(Path::new(&path));
        }
        let mut tried = Vec::new();
        for name in names(std::env::var_os("OMPI_COMM_WORLD_SIZE").is_some()) {
            match Self::load(Path::new(name)) {
                Ok(library) => return Ok(library),
                Err(_) => tried.push(name),
            }
        }
        let expected = format!(
            "an MPI library (openmpi-bin or mpich, say, or its path in EXPERTILE_MPI) as one of {}",
            tried.join(", ")
        );
        Err(device("not found".into(), expected))
    }

    /// The library of that file, or of that name. A process has one MPI: with another loaded already, it is that one.
    pub(super) fn load(path: &Path) -> Result<&'static Self> {
        let mut process = process();
        if let Some(library) = process.library {
            if library.path == path {
                return Ok(library);
            }
            return Err(device(path.display().to_string(), format!("{}, which is loaded", library.path.display())));
        }
        let library: &'static Self = Box::leak(Box::new(Self::open(path)?));
        process.library = Some(library);
        Ok(library)
    }

    #[allow(unsafe_code)]
    fn open(path: &Path) -> Result<Self> {
        let failed = |error: libloading::Error| device(format!("{} ({error})", path.display()), "an MPI library");
        // SAFETY: loading an MPI library runs its initialisers, which is what it is for. It is never unloaded.
        let library = std::mem::ManuallyDrop::new(unsafe { open_global(path) }.map_err(failed)?);
        // SAFETY: the types are those of the MPI standard, handles as the head of this file says.
        unsafe {
            Ok(Self {
                path: path.to_owned(),
                name: library_version(&library).map_err(failed)?,
                constants: constants(&library).map_err(failed)?,
                init_thread: *library.get(c"MPI_Init_thread").map_err(failed)?,
                initialized: *library.get(c"MPI_Initialized").map_err(failed)?,
                finalized: *library.get(c"MPI_Finalized").map_err(failed)?,
                finalize: *library.get(c"MPI_Finalize").map_err(failed)?,
                query_thread: *library.get(c"MPI_Query_thread").map_err(failed)?,
                comm_rank: *library.get(c"MPI_Comm_rank").map_err(failed)?,
                comm_size: *library.get(c"MPI_Comm_size").map_err(failed)?,
                comm_dup: *library.get(c"MPI_Comm_dup").map_err(failed)?,
                comm_set_errhandler: *library.get(c"MPI_Comm_set_errhandler").map_err(failed)?,
                isend: *library.get(c"MPI_Isend").map_err(failed)?,
                irecv: *library.get(c"MPI_Irecv").map_err(failed)?,
                test: *library.get(c"MPI_Test").map_err(failed)?,
                get_count: *library.get(c"MPI_Get_count").map_err(failed)?,
                error_string: *library.get(c"MPI_Error_string").map_err(failed)?,
            })
        }
    }

    /// Starts MPI unless it runs; returns whether it did.
    #[allow(unsafe_code)]
    fn start(&self) -> Result<bool> {
        let [mut running, mut ended, mut threads] = [0; 3];
        // SAFETY: these two may be called at any time; the pointers are valid for the call.
        let called = unsafe { [(self.initialized)(&mut running), (self.finalized)(&mut ended)] };
        called.into_iter().try_for_each(|code| self.check("MPI_Initialized", code))?;
        if ended != 0 {
            return Err(device("ended".into(), "an MPI that this process has not ended yet: it starts once"));
        }
        if running != 0 {
            // SAFETY: MPI runs; the pointer is valid for the call.
            let code = unsafe { (self.query_thread)(&mut threads) };
            self.check("MPI_Query_thread", code)?;
        } else {
            let (none, no_list) = (std::ptr::null_mut(), std::ptr::null_mut());
            // SAFETY: MPI was neither started nor ended, and the standard allows null for both arguments.
            let code = unsafe { (self.init_thread)(none, no_list, self.constants.serialized, &mut threads) };
            self.check("MPI_Init_thread", code)?;
        }
        if threads < self.constants.serialized {
            let actual = format!("{}, started for thread level {threads}", self.name);
            return Err(device(actual, "MPI_THREAD_SERIALIZED or more"));
        }
        Ok(running == 0)
    }

    #[allow(unsafe_code)]
    fn check(&self, call: &'static str, code: c_int) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        let (mut text, mut len) = ([0 as c_char; TEXT], 0);
        // SAFETY: the text is longer than any ABI's MPI_MAX_ERROR_STRING (512), and ends with a zero in any case.
        let message = unsafe {
            (self.error_string)(code, text.as_mut_ptr(), &mut len);
            CStr::from_ptr(text.as_ptr())
        };
        Err(Error::Mpi { call, code, message: message.to_string_lossy().into_owned() })
    }
}

/// Bytes of any text of MPI's: MPICH's MPI_MAX_LIBRARY_VERSION_STRING is 8192, and every other is shorter.
const TEXT: usize = 16 << 10;

/// Names of the library: the launcher's own first, for another one would see a world of one rank.
fn names(of_open_mpi: bool) -> [&'static str; 3] {
    if of_open_mpi {
        ["libmpi.so.40", "libmpi_abi.so.1", "libmpi.so.12"]
    } else {
        ["libmpi_abi.so.1", "libmpi.so.12", "libmpi.so.40"]
    }
}

/// Opens a library so that the plugins which Open MPI loads itself find its symbols.
///
/// # Safety
/// As [`libloading::Library::new`].
#[cfg(unix)]
#[allow(unsafe_code)]
unsafe fn open_global(path: &Path) -> std::result::Result<libloading::Library, libloading::Error> {
    use libloading::os::unix;
    // SAFETY: the caller's promise.
    unsafe { unix::Library::open(Some(path), unix::RTLD_NOW | unix::RTLD_GLOBAL) }.map(Into::into)
}

#[cfg(not(unix))]
#[allow(unsafe_code)]
unsafe fn open_global(path: &Path) -> std::result::Result<libloading::Library, libloading::Error> {
    // SAFETY: the caller's promise.
    unsafe { libloading::Library::new(path) }
}

/// The start of what the library calls itself: its name and version.
#[allow(unsafe_code)]
fn library_version(library: &libloading::Library) -> std::result::Result<String, libloading::Error> {
    let (mut text, mut len) = (vec![0 as c_char; TEXT], 0);
    // SAFETY: the standard's type; the function may be called before MPI is started, and the text is longer than any
    // ABI's MPI_MAX_LIBRARY_VERSION_STRING.
    let text = unsafe {
        let get = library.get::<unsafe extern "C" fn(*mut c_char, *mut c_int) -> c_int>(c"MPI_Get_library_version")?;
        get(text.as_mut_ptr(), &mut len);
        CStr::from_ptr(text.as_ptr())
    };
    let text = text.to_string_lossy();
    let name = text.lines().next().and_then(|line| line.split(',').next()).unwrap_or_default();
    Ok(name.split_whitespace().collect::<Vec<_>>().join(" "))
}

/// The constants of the library's ABI.
#[allow(unsafe_code)]
fn constants(library: &libloading::Library) -> std::result::Result<Constants, libloading::Error> {
    let (mut major, mut minor) = (-1, -1);
    // SAFETY: the standard's type; it may be called before MPI is started. Libraries of an ABI of their own answer -1.
    unsafe {
        if let Ok(get) = library.get::<unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int>(c"MPI_Abi_get_version") {
            get(&mut major, &mut minor);
        }
    }
    if major >= 1 {
        return Ok(Constants { world: 0x101, byte: 0x247, errors_return: 0x143, serialized: 2048 });
    }
    // SAFETY: Open MPI's handles are the addresses of these objects, which are not read.
    let address = |name: &CStr| unsafe { library.get::<*const u8>(name) }.map(|symbol| *symbol as Handle);
    match address(c"ompi_mpi_comm_world") {
        Ok(world) => Ok(Constants {
            world,
            byte: address(c"ompi_mpi_byte")?,
            errors_return: address(c"ompi_mpi_errors_return")?,
            serialized: 2,
        }),
        Err(_) => Ok(Constants { world: 0x4400_0000, byte: 0x4c00_010d, errors_return: 0x5400_0001, serialized: 2 }),
    }
}

/// A communicator of this library's own, so that its messages meet no others.
#[derive(Debug)]
pub(super) struct Communicator {
    library: &'static Library,
    handle: Handle,
    abandoned: AtomicBool,
}

/// Every message has it: messages of two ranks arrive in the order in which they were sent.
const TAG: c_int = 0;

impl Communicator {
    /// All ranks; starts MPI unless it runs.
    #[allow(unsafe_code)]
    pub(super) fn world(library: &'static Library) -> Result<Self> {
        let mut process = process();
        let started = library.start()?;
        process.started |= started;
        let mut handle: Handle = 0;
        let Constants { world, errors_return, .. } = library.constants;
        // SAFETY: MPI runs, and the pointer is valid for the call.
        let code = unsafe { (library.comm_dup)(world, &mut handle) };
        library.check("MPI_Comm_dup", code)?;
        // SAFETY: MPI runs, and both are handles of its.
        let code = unsafe { (library.comm_set_errhandler)(handle, errors_return) };
        library.check("MPI_Comm_set_errhandler", code)?;
        process.communicators += 1;
        drop(process);
        let communicator = Self { library, handle, abandoned: AtomicBool::new(false) };
        communicator.check_launcher()?;
        Ok(communicator)
    }

    /// Fails if the launcher has started more ranks than this library sees: it is not the launcher's.
    fn check_launcher(&self) -> Result<()> {
        let ranks = self.ranks()?;
        let number = |name: &str| std::env::var(name).ok()?.parse::<usize>().ok();
        let launched = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"].into_iter().find_map(number);
        match launched {
            Some(launched) if launched != ranks => {
                let actual = format!("{:?}, which sees {ranks} ranks", self.library);
                let expected = format!("the library of the launcher, which has started {launched}: see EXPERTILE_MPI");
                Err(device(actual, expected))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn library(&self) -> &str {
        &self.library.name
    }

    pub(super) fn abandon(&self) {
        self.abandoned.store(true, Ordering::Relaxed);
    }

    #[allow(unsafe_code)]
    pub(super) fn rank(&self) -> Result<usize> {
        let mut rank = 0;
        // SAFETY: MPI runs, and the pointer is valid for the call.
        let code = unsafe { (self.library.comm_rank)(self.handle, &mut rank) };
        self.library.check("MPI_Comm_rank", code)?;
        Ok(rank as usize)
    }

    #[allow(unsafe_code)]
    pub(super) fn ranks(&self) -> Result<usize> {
        let mut ranks = 0;
        // SAFETY: MPI runs, and the pointer is valid for the call.
        let code = unsafe { (self.library.comm_size)(self.handle, &mut ranks) };
        self.library.check("MPI_Comm_size", code)?;
        Ok(ranks as usize)
    }

    /// Starts to send; `bytes` must stay where they are until [`Communicator::test`] says that it is done.
    #[allow(unsafe_code)]
    pub(super) fn send(&self, bytes: &[u8], rank: usize, request: &mut Request) -> Result<()> {
        let (start, len, byte) = (bytes.as_ptr().cast(), bytes.len() as c_int, self.library.constants.byte);
        // SAFETY: MPI runs; `bytes` is that long, and no longer than an int counts. That it lives until the request is
        // done is the caller's: `Mpi` owns it, and leaves it to MPI for ever if a call fails.
        let code = unsafe { (self.library.isend)(start, len, byte, rank as c_int, TAG, self.handle, &mut request.0) };
        self.library.check("MPI_Isend", code)
    }

    /// Starts to receive; `bytes` as in [`Communicator::send`].
    #[allow(unsafe_code)]
    pub(super) fn receive(&self, bytes: &mut [u8], rank: usize, request: &mut Request) -> Result<()> {
        let (start, len, byte) = (bytes.as_mut_ptr().cast(), bytes.len() as c_int, self.library.constants.byte);
        // SAFETY: as in `send`; MPI writes no more than `len` bytes, and reports a longer message.
        let code = unsafe { (self.library.irecv)(start, len, byte, rank as c_int, TAG, self.handle, &mut request.0) };
        self.library.check("MPI_Irecv", code)
    }

    /// What arrived, if it has; lets MPI work in any case.
    #[allow(unsafe_code)]
    pub(super) fn test(&self, request: &mut Request) -> Result<Option<Status>> {
        let (mut done, mut status) = (0, Status([0; 64]));
        // SAFETY: MPI runs, the request is one of its, and the status has room for any ABI's.
        let code = unsafe { (self.library.test)(&mut request.0, &mut done, &mut status) };
        self.library.check("MPI_Test", code)?;
        Ok((done != 0).then_some(status))
    }

    /// Bytes of a message that has arrived.
    #[allow(unsafe_code)]
    pub(super) fn bytes(&self, status: &Status) -> Result<usize> {
        let mut bytes = 0;
        // SAFETY: MPI runs, and has written the status.
        let code = unsafe { (self.library.get_count)(status, self.library.constants.byte, &mut bytes) };
        self.library.check("MPI_Get_count", code)?;
        Ok(usize::try_from(bytes).unwrap_or(usize::MAX))
    }
}

impl Drop for Communicator {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        let mut process = process();
        process.communicators -= 1;
        // A panicking rank does not come to the end that the others wait at.
        process.abandoned |= *self.abandoned.get_mut() || std::thread::panicking();
        if process.communicators == 0 && process.started && !process.abandoned {
            process.started = false;
            // SAFETY: MPI was started here and runs, and no message of this library is under way: every call that
            // returned well has tested all of its own, and one that failed has abandoned MPI.
            unsafe { (self.library.finalize)() };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_launchers_own_library_comes_first() {
        assert_eq!(names(true)[0], "libmpi.so.40");
        assert_eq!(names(false), ["libmpi_abi.so.1", "libmpi.so.12", "libmpi.so.40"]);
    }
}
