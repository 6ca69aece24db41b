//! What can be wrong with a file: one enum for the whole crate.
//!
//! Every message names the file, the tensor or key, its value and what was expected.

use std::path::{Path, PathBuf};

/// Shorthand for a result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Everything this crate refuses.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file that cannot be opened, mapped or read.
    #[error("{} cannot be read", file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// JSON that does not parse, or the header of a safetensors file whose offsets and shapes contradict each other.
    #[error("{}: {part} is not valid", file.display())]
    Json {
        /// The file.
        file: PathBuf,
        /// Which part of it.
        part: &'static str,
        /// Where and why.
        source: serde_json::Error,
    },
    /// Bytes that are not the format they should be.
    #[error("{}: {part} is {actual}, expected {expected}", file.display())]
    Format {
        /// The file.
        file: PathBuf,
        /// Which part of it.
        part: &'static str,
        /// What stands there.
        actual: String,
        /// What would fit.
        expected: String,
    },
    /// A key of `config.json` that is missing or has a value that this crate does not take.
    #[error("{}: {key} is {actual}, expected {expected}", file.display())]
    Config {
        /// The file.
        file: PathBuf,
        /// The key.
        key: String,
        /// Its value, or "missing".
        actual: String,
        /// What would fit.
        expected: String,
    },
    /// Router settings that contradict each other.
    #[error("{}: the router cannot be", file.display())]
    Router {
        /// The file.
        file: PathBuf,
        /// Which setting, and what was expected.
        source: expertile::Error,
    },
    /// Sizes that no layer can have.
    #[error("{}: the layer cannot be", file.display())]
    Sizes {
        /// The file.
        file: PathBuf,
        /// Which size, and what was expected.
        source: expertile::Error,
    },
    /// A layer number that the checkpoint does not have.
    #[error("{}: layer is {layer}, expected below {layers}", file.display())]
    Layer {
        /// The file that says how many layers there are.
        file: PathBuf,
        /// The layer asked for.
        layer: usize,
        /// Layers there are.
        layers: usize,
    },
    /// A layer without experts.
    #[error("{}: layer {layer} is dense ({because}), expected a layer with experts", file.display())]
    DenseLayer {
        /// The file that says so.
        file: PathBuf,
        /// The layer asked for.
        layer: usize,
        /// The key or tensor that says so.
        because: String,
    },
    /// A tensor that is not there.
    #[error("{}: tensor {tensor} is missing, expected {expected}", file.display())]
    MissingTensor {
        /// The file, or the index, that should have it.
        file: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// Its dtype and shape, in words.
        expected: String,
    },
    /// A tensor of the block that the family is not known to have: it could change the numbers.
    #[error("{}: tensor {tensor} is not known for {family}, expected none that could change the block", file.display())]
    UnknownTensor {
        /// The file that holds it.
        file: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// The family's `model_type`.
        family: &'static str,
    },
    /// Two tensors that could both be meant.
    #[error("{}: tensors {tensor} and {other} are both there, expected one of them", file.display())]
    AmbiguousTensor {
        /// The checkpoint's config.
        file: PathBuf,
        /// One tensor's name.
        tensor: String,
        /// The other's.
        other: String,
    },
    /// A tensor of another shape.
    #[error("{}: tensor {tensor} has shape {actual:?}, expected {expected}", file.display())]
    Shape {
        /// The file.
        file: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// Its shape.
        actual: Vec<usize>,
        /// The shape that would fit.
        expected: String,
    },
    /// A tensor of another element type.
    #[error("{}: tensor {tensor} has dtype {actual}, expected {expected}", file.display())]
    Dtype {
        /// The file.
        file: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// Its dtype, as safetensors names it.
        actual: String,
        /// The dtypes that would fit.
        expected: String,
    },
    /// An index entry that is not the name of a file in the checkpoint's folder.
    #[error("{}: weight_map[{tensor}] is {actual:?}, expected the name of a file in the same folder", file.display())]
    ShardName {
        /// The index.
        file: PathBuf,
        /// The tensor whose entry it is.
        tensor: String,
        /// The entry.
        actual: String,
    },
    /// A file, or a tensor of it, that memory does not hold.
    #[error("{}: {part} takes {bytes} bytes, expected no more than memory can be had for", file.display())]
    Memory {
        /// The file.
        file: PathBuf,
        /// The tensor, or "the file".
        part: String,
        /// Bytes that it takes in memory.
        bytes: u64,
    },
    /// Weights that the library refuses to pack.
    #[error("{what} cannot be packed")]
    Pack {
        /// Which weights.
        what: String,
        /// The library's reason.
        source: expertile::Error,
    },
}

impl Error {
    pub(crate) fn io(file: &Path, source: std::io::Error) -> Self {
        Self::Io { file: file.to_owned(), source }
    }

    pub(crate) fn memory(file: &Path, part: impl Into<String>, bytes: u64) -> Self {
        Self::Memory { file: file.to_owned(), part: part.into(), bytes }
    }

    pub(crate) fn json(file: &Path, part: &'static str, source: serde_json::Error) -> Self {
        Self::Json { file: file.to_owned(), part, source }
    }

    pub(crate) fn format(
        file: &Path,
        part: &'static str,
        actual: impl Into<String>,
        expected: impl Into<String>,
    ) -> Self {
        Self::Format { file: file.to_owned(), part, actual: actual.into(), expected: expected.into() }
    }

    pub(crate) fn shape(file: &Path, tensor: &str, actual: &[usize], expected: impl Into<String>) -> Self {
        Self::Shape { file: file.to_owned(), tensor: tensor.into(), actual: actual.to_vec(), expected: expected.into() }
    }

    pub(crate) fn dtype(file: &Path, tensor: &str, actual: impl ToString, expected: impl Into<String>) -> Self {
        Self::Dtype {
            file: file.to_owned(),
            tensor: tensor.into(),
            actual: actual.to_string(),
            expected: expected.into(),
        }
    }
}
