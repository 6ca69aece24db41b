//! The files of a checkpoint folder: config, index, shards.
//!
//! A folder with a `model.safetensors` is read from that file, whatever its index says (Transformers does the same,
//! and an index may be left over); without one the index names the shards. Only regular files are opened, or links to
//! them.
//!
//! Opening reads `config.json` and the index only; a shard is mapped when the first tensor in it is asked for, and its
//! weights are read by whoever touches them. A mapped file must not be changed or cut while the [`Checkpoint`] lives
//! (as for every program that maps files): a load past a new end is a `SIGBUS`. [`Checkpoint::mapped_files`] tells a
//! program that handles the signal which file it was.

use crate::config::Config;
use crate::error::{Error, Result};
use crate::family::Family;
use crate::json;
use crate::read;
use crate::tensors::{Header, Tensor};
use memmap2::Mmap;
use std::collections::HashMap;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};
use std::sync::OnceLock;

const CONFIG: &str = "config.json";
const SINGLE_FILE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// A checkpoint: its config, and its tensors wherever they are.
#[derive(Debug)]
pub struct Checkpoint<'a> {
    config: Config,
    /// `None` if it was opened from bytes.
    folder: Option<PathBuf>,
    shards: Vec<Shard<'a>>,
    /// Which shard holds a tensor; `None` when there is one shard and it holds everything.
    index: Option<Index>,
}

#[derive(Debug)]
struct Index {
    file: PathBuf,
    shard_of: HashMap<String, usize>,
}

#[derive(Debug)]
struct Shard<'a> {
    file: PathBuf,
    open: OnceLock<OpenShard<'a>>,
}

#[derive(Debug)]
struct OpenShard<'a> {
    header: Header,
    bytes: Bytes<'a>,
}

#[derive(Debug)]
enum Bytes<'a> {
    Mapped(Mmap),
    Borrowed(&'a [u8]),
}

impl Bytes<'_> {
    fn as_slice(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Borrowed(bytes) => bytes,
        }
    }
}

impl Checkpoint<'static> {
    /// Opens a Hugging Face checkpoint folder: `config.json` and `model.safetensors`, or its index with shards.
    ///
    /// # Errors
    /// [`Error::Io`] for a file that cannot be read, [`Error::Format`] for one that is no regular file,
    /// [`Error::Json`] for one that is not JSON, [`Error::Config`], [`Error::ShardName`] for an index entry that leads
    /// out of the folder.
    pub fn open(folder: &Path) -> Result<Self> {
        let file = folder.join(CONFIG);
        let config = Config::parse(&file, &read::read_json(&file)?)?;
        let (single, index) = (folder.join(SINGLE_FILE), folder.join(INDEX));
        let folder = Some(folder.to_owned());
        if single.is_file() || !index.exists() {
            return Ok(Self { config, folder, shards: vec![Shard::closed(single)], index: None });
        }
        let bytes = read::read_json(&index)?;
        let (index, names) = Index::parse(index, &bytes)?;
        let shards = names.iter().map(|name| Shard::closed(single.with_file_name(name))).collect();
        Ok(Self { config, folder, shards, index: Some(index) })
    }
}

impl<'a> Checkpoint<'a> {
    /// A checkpoint from the bytes of its `config.json` and of its only `model.safetensors`.
    ///
    /// # Errors
    /// [`Error::Json`] and [`Error::Config`] for the config, [`Error::Format`] and [`Error::Json`] for the tensors.
    pub fn from_bytes(config: &[u8], file: &'a [u8]) -> Result<Self> {
        let config = Config::parse(Path::new(CONFIG), config)?;
        let name = PathBuf::from(SINGLE_FILE);
        let open = OpenShard { header: Header::parse(&name, file)?, bytes: Bytes::Borrowed(file) };
        let shard = Shard { file: name, open: OnceLock::from(open) };
        Ok(Self { config, folder: None, shards: vec![shard], index: None })
    }

    /// The model family.
    #[must_use]
    pub fn family(&self) -> &'static Family {
        self.config.family
    }

    /// Bytes that a layer on the CPU takes at the least: a byte to each weight that is packed (half of one where the
    /// config speaks of MXFP4), and the router's weight in f32. By the config alone, so that a layer that cannot fit need
    /// not be opened; 0 if the config describes no such layer.
    #[must_use]
    pub fn least_layer_bytes(&self, layer: usize) -> u128 {
        let Ok(block) = self.config.block(layer) else { return 0 };
        let shape = block.shape;
        let [hidden, intermediate, experts, w13_rows] =
            [shape.hidden(), shape.intermediate(), shape.local_experts(), shape.w13_rows()]
                .map(|extent| extent as u128);
        let shared = block.shared.unwrap_or(0) as u128;
        let weights = hidden.saturating_mul(w13_rows + intermediate);
        let weights = if self.config.quantization.speaks_of_mxfp4() { weights / 2 } else { weights };
        let expert = weights.saturating_add(4 * hidden);
        expert.saturating_mul(experts).saturating_add(hidden.saturating_mul(2 * shared))
    }

    /// The files that make up the checkpoint, or would if they were there: what a program that reads it must not write.
    pub fn files(&self) -> impl Iterator<Item = PathBuf> {
        let folder = self.folder.iter();
        let fixed = folder.flat_map(|folder| [CONFIG, SINGLE_FILE, INDEX].map(|name| folder.join(name)));
        fixed.chain(self.shards.iter().map(|shard| shard.file.clone()))
    }

    /// The files that are mapped so far, and the addresses that they are mapped at.
    pub fn mapped_files(&self) -> impl Iterator<Item = (&Path, Range<usize>)> {
        self.shards.iter().filter_map(|shard| match &shard.open.get()?.bytes {
            Bytes::Mapped(map) => {
                let start = map.as_ptr().addr();
                Some((shard.file.as_path(), start..start + map.len()))
            }
            Bytes::Borrowed(_) => None,
        })
    }

    /// The whole of its `config.json`.
    pub(crate) fn config_json(&self) -> Result<serde_json::Value> {
        let file = &self.config.file;
        json::parse(file, "config", &read::read_json(file)?)
    }

    pub(crate) fn config(&self) -> &Config {
        &self.config
    }

    /// Whether there is a tensor of that name. Opens the file where there is no index.
    pub(crate) fn has(&self, name: &str) -> Result<bool> {
        match &self.index {
            None => Ok(self.shards[0].open()?.header.has(name)),
            Some(index) => Ok(index.shard_of.contains_key(name)),
        }
    }

    /// The names of all tensors, in no particular order.
    pub(crate) fn names(&self) -> Result<Vec<&str>> {
        match &self.index {
            None => Ok(self.shards[0].open()?.header.names().collect()),
            Some(index) => Ok(index.shard_of.keys().map(String::as_str).collect()),
        }
    }

    /// The file that holds (or should hold) a tensor.
    pub(crate) fn file_of(&self, name: &str) -> &Path {
        match &self.index {
            None => &self.shards[0].file,
            Some(index) => index.shard_of.get(name).map_or(&index.file, |&shard| &self.shards[shard].file),
        }
    }

    /// The tensor of that name; `expected` describes it in case there is none.
    pub(crate) fn tensor(&self, name: &str, expected: impl Fn() -> String) -> Result<Tensor<'_>> {
        let missing =
            |file: &Path| Error::MissingTensor { file: file.to_owned(), tensor: name.into(), expected: expected() };
        let shard = match &self.index {
            None => &self.shards[0],
            Some(index) => &self.shards[*index.shard_of.get(name).ok_or_else(|| missing(&index.file))?],
        };
        let open = shard.open()?;
        open.header.tensor(open.bytes.as_slice(), name).ok_or_else(|| missing(&shard.file))
    }
}

impl Index {
    /// The index, and the names of the shards it speaks of.
    fn parse(file: PathBuf, bytes: &[u8]) -> Result<(Self, Vec<String>)> {
        let index = json::parse(&file, "index", bytes)?;
        let Some(serde_json::Value::Object(weight_map)) = index.get("weight_map") else {
            return Err(Error::format(&file, "weight_map", "missing or no object", "tensor names with file names"));
        };
        let mut names: Vec<String> = Vec::new();
        let mut number_of = HashMap::new();
        let mut shard_of = HashMap::with_capacity(weight_map.len());
        for (tensor, entry) in weight_map {
            let name = entry.as_str().filter(|name| is_file_name(name)).ok_or_else(|| Error::ShardName {
                file: file.clone(),
                tensor: tensor.clone(),
                actual: entry.as_str().map_or_else(|| entry.to_string(), str::to_owned),
            })?;
            let shard = *number_of.entry(name).or_insert_with(|| {
                names.push(name.to_owned());
                names.len() - 1
            });
            shard_of.insert(tensor.clone(), shard);
        }
        Ok((Self { file, shard_of }, names))
    }
}

/// Whether this is a plain name, which cannot lead out of a folder.
fn is_file_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == name)
        && !name.contains(['/', '\\', '\0'])
}

impl<'a> Shard<'a> {
    fn closed(file: PathBuf) -> Self {
        Self { file, open: OnceLock::new() }
    }

    fn open(&self) -> Result<&OpenShard<'a>> {
        if let Some(open) = self.open.get() {
            return Ok(open);
        }
        let bytes = Bytes::Mapped(map(&self.file)?);
        let header = Header::parse(&self.file, bytes.as_slice())?;
        Ok(self.open.get_or_init(|| OpenShard { header, bytes }))
    }
}

#[allow(unsafe_code)]
fn map(file: &Path) -> Result<Mmap> {
    let (opened, _) = read::open(file)?;
    // SAFETY: the map is only read. That nobody changes or cuts the file meanwhile cannot be enforced; the module's
    // documentation asks it of the caller, and every value in the file is checked or is a number of any bits.
    unsafe { Mmap::map(&opened) }.map_err(|source| Error::io(file, source))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_names_are_file_names() {
        for name in ["model-00001-of-00002.safetensors", "a", "..a"] {
            assert!(is_file_name(name), "{name}");
        }
        for name in ["", ".", "..", "../x", "/x", "a/b", "a/", "./a", "a\\b", "..\\x", "a\0b"] {
            assert!(!is_file_name(name), "{name:?}");
        }
    }

    #[test]
    fn an_index_of_another_shape_is_an_error() {
        for text in ["", "[", "[]", "{}", r#"{"weight_map": []}"#] {
            assert!(Index::parse("index".into(), text.as_bytes()).is_err(), "{text}");
        }
        for entry in [r#""../x""#, "7", "null", r#""/etc/passwd""#] {
            let text = format!(r#"{{"weight_map": {{"t": {entry}}}}}"#);
            let error = Index::parse("index".into(), text.as_bytes()).unwrap_err();
            assert!(matches!(&error, Error::ShardName { tensor, .. } if tensor == "t"), "{error}");
        }
    }
}
