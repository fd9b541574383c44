//! Seeded damage to the files of a checkpoint.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

/// A file that was damaged.
pub struct Damaged {
    /// Which one, in its folder.
    pub file: PathBuf,
    /// What it holds now.
    pub bytes: Vec<u8>,
    /// What was done, for messages.
    pub what: String,
    /// Sizes may have become so large that running takes forever.
    pub sizes: bool,
}

/// SplitMix64.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed ^ 0x5851_F42D_4C95_7F2D)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `n`, which is not zero.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    fn pick<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.below(list.len())]
    }
}

/// The files in `path` (a folder or one file), with their contents.
pub fn files(path: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    fn add(root: &Path, path: &Path, files: &mut BTreeMap<PathBuf, Vec<u8>>) {
        if path.is_dir() {
            for entry in std::fs::read_dir(path).expect("it is a folder") {
                add(root, &entry.expect("it can be listed").path(), files);
            }
        } else {
            let name = path.strip_prefix(root).expect("it lies in the folder").to_owned();
            // Recorded cases are no part of the checkpoint.
            let text = name.to_string_lossy().into_owned();
            let case = text.ends_with(".safetensors") && !text.starts_with("policy_");
            if text != "cases.json" && (!case || text == WEIGHTS) {
                files.insert(name, std::fs::read(path).expect("it can be read"));
            }
        }
    }
    let mut found = BTreeMap::new();
    add(path, path, &mut found);
    found
}

const WEIGHTS: &str = "model.safetensors";
const HUGE: [u64; 7] = [0, 1, u32::MAX as u64, 1 << 40, 1 << 62, i64::MAX as u64, u64::MAX];

fn flip(bytes: &mut [u8], range: std::ops::Range<usize>, count: usize, random: &mut Random) {
    for _ in 0..count {
        let at = range.start + random.below(range.len());
        bytes[at] ^= 1 << random.below(8);
    }
}

/// Header of safetensors `bytes`, and where the data begin.
fn header(bytes: &[u8]) -> (Value, usize) {
    let length = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
    let header = serde_json::from_slice(&bytes[8..8 + length]).expect("the original is whole");
    (header, 8 + length)
}

fn with_header(header: &Value, data: &[u8]) -> Vec<u8> {
    let text = header.to_string();
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes.extend(data);
    bytes
}

/// One mutation of a checkpoint folder.
pub fn folder(files: &BTreeMap<PathBuf, Vec<u8>>, seed: u64) -> Damaged {
    let random = &mut Random::new(seed);
    let named = |end: &str| -> Vec<&PathBuf> {
        files.keys().filter(|f| f.to_string_lossy().ends_with(end)).collect()
    };
    let kind = seed % 10;
    let file = match kind {
        // Weights, or the statistics beside them.
        0..=5 if random.below(4) == 0 => (*random.pick(&named(".safetensors"))).clone(),
        0..=5 => PathBuf::from(WEIGHTS),
        6 => random.pick(&files.keys().cloned().collect::<Vec<_>>()).clone(),
        7 => (*random.pick(&named(".json"))).clone(),
        _ => PathBuf::from("config.json"),
    };
    let mut bytes = files[&file].clone();
    let mut what = match kind {
        0..=5 => damage_tensors(&mut bytes, kind, random),
        6 => {
            bytes.truncate(random.below(bytes.len()));
            format!("cut to {} bytes", bytes.len())
        }
        7 => {
            let (end, count) = (bytes.len(), 1 + random.below(4));
            flip(&mut bytes, 0..end, count, random);
            format!("{count} bits flipped")
        }
        _ => {
            let mut config = serde_json::from_slice(&bytes).expect("the original is whole");
            let what = change_leaf(&mut config, random);
            bytes = config.to_string().into_bytes();
            what
        }
    };
    what = format!("{seed}: {}: {what}", file.display());
    Damaged { file, bytes, what, sizes: kind >= 7 }
}

/// Damage of one `kind` to a safetensors file.
fn damage_tensors(bytes: &mut Vec<u8>, kind: u64, random: &mut Random) -> String {
    let (mut parsed, data) = header(bytes);
    let count = 1 + random.below(16);
    match kind {
        0 => {
            flip(bytes, 8..data, count, random);
            return format!("{count} bits of the header flipped");
        }
        1 => {
            let end = bytes.len();
            flip(bytes, data..end, count, random);
            return format!("{count} bits of the data flipped");
        }
        2 => {
            let sizes = [&HUGE[..], &[bytes.len() as u64, data as u64 - 9, data as u64 - 7]];
            let length = *random.pick(&sizes.concat());
            bytes[..8].copy_from_slice(&length.to_le_bytes());
            return format!("the header's length is {length}");
        }
        _ => {}
    }
    let names: Vec<String> = parsed
        .as_object()
        .expect("the original is whole")
        .keys()
        .filter(|key| *key != "__metadata__")
        .cloned()
        .collect();
    let name = random.pick(&names).clone();
    let entry = &mut parsed[&name];
    let what = match kind {
        3 => {
            let types = ["I64", "F16", "BF16", "F64", "BOOL", "U8", "F8_E4M3", "none", "f32"];
            let dtype = *random.pick(&types);
            entry["dtype"] = json!(dtype);
            format!("`{name}` has type {dtype}")
        }
        4 if random.below(2) == 0 => {
            *bytes = doubled(bytes, &name);
            return format!("`{name}` has twice as many values");
        }
        4 => {
            let (a, b) = (*random.pick(&HUGE), *random.pick(&HUGE));
            let first = entry["shape"][0].as_u64().unwrap_or(1);
            let shapes =
                [json!([]), json!([a]), json!([a, b]), json!([first, a]), json!([1, first])];
            entry["shape"] = random.pick(&shapes).clone();
            if random.below(3) == 0 {
                entry["data_offsets"] = json!([a, b]);
            }
            format!("`{name}` has shape {} at {}", entry["shape"], entry["data_offsets"])
        }
        _ => {
            let map = parsed.as_object_mut().expect("the original is whole");
            let entry = map.remove(&name).expect("it was there");
            if random.below(2) == 0 {
                map.insert(format!("{name}x"), entry);
            }
            format!("`{name}` is missing")
        }
    };
    *bytes = with_header(&parsed, &bytes[data..]);
    what
}

/// The same file with twice the values of tensor `wanted`, and everything else in order.
fn doubled(bytes: &[u8], wanted: &str) -> Vec<u8> {
    let file = SafeTensors::deserialize(bytes).expect("the original is whole");
    let tensors: Vec<_> = file
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            let (mut shape, mut data) = (view.shape().to_vec(), view.data().to_vec());
            if name == wanted {
                data.extend_from_within(..);
                match shape.first_mut() {
                    Some(first) => *first *= 2,
                    None => shape.push(2),
                }
            }
            (name, view.dtype(), shape, data)
        })
        .collect();
    let views = tensors.iter().map(|(name, dtype, shape, data)| {
        let view = TensorView::new(*dtype, shape.clone(), data).expect("it fits its shape");
        (name.clone(), view)
    });
    safetensors::serialize(views, None).expect("it can be written")
}

/// Every value in `value` that holds no others, by its path.
fn leaves(value: &Value, path: String, found: &mut Vec<String>) {
    match value {
        Value::Object(map) if !map.is_empty() => {
            map.iter().for_each(|(k, v)| leaves(v, format!("{path}/{k}"), found));
        }
        Value::Array(list) if !list.is_empty() => {
            list.iter().enumerate().for_each(|(i, v)| leaves(v, format!("{path}/{i}"), found));
        }
        _ => found.push(path),
    }
}

/// Replaces one value of a configuration by something that does not belong there.
fn change_leaf(config: &mut Value, random: &mut Random) -> String {
    let mut paths = Vec::new();
    leaves(config, String::new(), &mut paths);
    let (path, other) = (random.pick(&paths).clone(), random.pick(&paths).clone());
    let swapped = config.pointer(&other).expect("the path was found").clone();
    let values = [
        json!(0),
        json!(1),
        json!(-1),
        json!(7),
        json!(1u64 << 20),
        json!(u64::MAX),
        json!(i64::MIN),
        json!(1e300),
        json!(0.3),
        json!(null),
        json!("smolvla"),
        json!([]),
        json!({}),
        json!(true),
        swapped,
    ];
    let value = random.pick(&values).clone();
    *config.pointer_mut(&path).expect("the path was found") = value.clone();
    format!("{path} is {value}")
}

/// One mutation of a bundle.
pub fn bundle(whole: &[u8], seed: u64) -> Damaged {
    let random = &mut Random::new(seed);
    let mut bytes = whole.to_vec();
    let kind = seed % 8;
    // The first tensor's name stands where the metadata end.
    let tensors = tensor_infos(whole);
    let ends = tensors.last().map_or(whole.len(), |t| t + 64).min(whole.len());
    let mut sizes = false;
    let what = match kind {
        0 => {
            let count = 1 + random.below(8);
            flip(&mut bytes, 0..ends, count, random);
            sizes = true;
            format!("{count} bits of the header flipped")
        }
        1 => {
            let count = 1 + random.below(64);
            flip(&mut bytes, ends..whole.len(), count, random);
            format!("{count} bits of the data flipped")
        }
        2 => {
            bytes.truncate(random.below(whole.len()));
            format!("cut to {} bytes", bytes.len())
        }
        3 => {
            // Version, number of tensors, number of keys, length of the first key.
            let at = *random.pick(&[4, 8, 16, 24]);
            let value = *random.pick(&HUGE);
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
            format!("byte {at} begins {value}")
        }
        4 => {
            let at = random.below(ends - 8);
            let value = *random.pick(&HUGE);
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
            sizes = true;
            format!("byte {at} begins {value}")
        }
        5 => {
            let keys = ["sinew.config", "sinew.tokenizer", "sinew.preprocessor", "general.arch"];
            // Not every family has a tokenizer.
            let there = |key: &&'static str| Some((*key, find(whole, key.as_bytes(), 0)?));
            let keys: Vec<(&str, usize)> = keys.iter().filter_map(there).collect();
            let (key, at) = *random.pick(&keys);
            bytes[at + key.len() - 1] = b'X';
            format!("`{key}` has another name")
        }
        6 => {
            // Behind a tensor's name: number of dimensions, dimensions, type, offset.
            let at = *random.pick(&tensors) + random.below(32);
            let value = *random.pick(&HUGE);
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
            format!("byte {at}, of a tensor, begins {value}")
        }
        _ => {
            // A digit of the configuration.
            let start = find(whole, b"input_features", 0).expect("every bundle has it");
            let digits: Vec<usize> = (start..(start + 6000).min(ends))
                .filter(|at| whole[*at].is_ascii_digit())
                .collect();
            let at = *random.pick(&digits);
            bytes[at] = *random.pick(b"0123456789-.e");
            sizes = true;
            format!("digit {at} is {}", char::from(bytes[at]))
        }
    };
    Damaged { file: PathBuf::new(), bytes, what: format!("{seed}: {what}"), sizes }
}

/// Where the tensors' descriptions stand: behind each name.
fn tensor_infos(bytes: &[u8]) -> Vec<usize> {
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(next) = find(bytes, b".weight", at) {
        at = next + b".weight".len();
        // In the list of descriptions a small number of dimensions follows.
        if bytes.get(at..at + 4).is_some_and(|b| b[0] >= 1 && b[0] <= 4 && b[1..] == [0; 3]) {
            found.push(at);
        }
    }
    found
}

fn find(bytes: &[u8], wanted: &[u8], from: usize) -> Option<usize> {
    let rest = bytes.get(from..)?;
    rest.windows(wanted.len()).position(|window| window == wanted).map(|at| at + from)
}
