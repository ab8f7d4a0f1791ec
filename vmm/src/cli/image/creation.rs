//! What a new image is to be: `-o key=value,…`, as qemu-img has it.

use std::fmt::Write as _;

use anyhow::{Context, bail};
use block::ops::{NewImage, parse_size};
use block::{Compression, CreateOptions, Format, Preallocation};

/// The text of `-o help`.
const QCOW2_HELP: &str = "\
Supported qcow2 options:
  backing_file=<str>     - File name of a base image
  backing_fmt=<str>      - Image format of the base image
  cluster_size=<size>    - qcow2 cluster size
  compat=<str>           - Compatibility level (v2 [0.10] or v3 [1.1])
  compression_type=<str> - Compression method used for image cluster compression
  data_file=<str>        - File name of an external data file
  data_file_raw=<bool (on/off)> - The external data file must stay valid as a raw image
  extended_l2=<bool (on/off)> - Extended L2 tables
  lazy_refcounts=<bool (on/off)> - Postpone refcount updates
  preallocation=<str>    - Preallocation mode (allowed values: off, metadata, falloc, full)
  refcount_bits=<num>    - Width of a reference count entry in bits
  size=<size>            - Virtual disk size
";

const RAW_HELP: &str = "\
Supported raw options:
  preallocation=<str>    - Preallocation mode (allowed values: off, falloc, full)
  size=<size>            - Virtual disk size
";

/// The options of a new image.
#[derive(Clone, Debug)]
pub(super) struct Creation {
    pub format: Format,
    /// The disk's size in bytes, if it was given.
    pub size: Option<u64>,
    pub options: CreateOptions,
    /// The name and the format of the backing file.
    pub backing: Option<String>,
    pub backing_format: Option<Format>,
    /// `compat`, as it was written.
    compat: Option<String>,
    preallocation: bool,
    data_file_raw: bool,
}

/// Whether `help` is among the options.
pub(super) fn asks_for_help(texts: &[String]) -> bool {
    let mut words = texts.iter().flat_map(|text| text.split(','));
    words.any(|word| word == "help" || word == "?")
}

/// The text that answers `-o help`, if that is among the options.
pub(super) fn help(format: Format, texts: &[String]) -> Option<&'static str> {
    asks_for_help(texts).then_some(match format {
        Format::Raw => RAW_HELP,
        Format::Qcow2 => QCOW2_HELP,
    })
}

/// Divides at single commas; two stand for one.
pub(super) fn split(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        if letter == ',' && letters.peek() != Some(&',') {
            parts.push(String::new());
            continue;
        }
        if letter == ',' {
            letters.next();
        }
        if let Some(last) = parts.last_mut() {
            last.push(letter);
        }
    }
    parts.retain(|part| !part.is_empty());
    parts
}

pub(super) fn switch(value: Option<&str>) -> anyhow::Result<bool> {
    match value {
        None | Some("on" | "yes" | "true") => Ok(true),
        Some("off" | "no" | "false") => Ok(false),
        Some(other) => bail!("'{other}' is neither on nor off"),
    }
}

impl Creation {
    /// Reads all `-o` options.
    pub(super) fn new(format: Format, texts: &[String]) -> anyhow::Result<Self> {
        let mut creation = Self {
            format,
            size: None,
            options: CreateOptions::default(),
            backing: None,
            backing_format: None,
            compat: None,
            preallocation: false,
            data_file_raw: false,
        };
        for part in texts.iter().flat_map(|text| split(text)) {
            let (key, value) = match part.split_once('=') {
                Some((key, value)) => (key, Some(value)),
                None => (part.as_str(), None),
            };
            creation
                .set(key, value)
                .with_context(|| format!("-o {key}"))?;
        }
        Ok(creation)
    }

    fn set(&mut self, key: &str, value: Option<&str>) -> anyhow::Result<()> {
        let text = || value.context("give it a value: key=value");
        let options = &mut self.options;
        match (key, self.format) {
            ("size", _) => self.size = Some(parse_size(text()?)?),
            ("preallocation", _) => {
                options.preallocation = preallocation(text()?)?;
                self.preallocation = true;
            }
            ("backing_file", Format::Qcow2) => self.backing = Some(text()?.to_owned()),
            ("backing_fmt", Format::Qcow2) => {
                let format = super::source::format(text()?).map_err(anyhow::Error::msg)?;
                self.backing_format = Some(format);
            }
            ("cluster_size", Format::Qcow2) => options.cluster_size = parse_size(text()?)?,
            ("refcount_bits", Format::Qcow2) => options.refcount_bits = text()?.parse()?,
            ("compat", Format::Qcow2) => {
                options.version = match text()? {
                    "0.10" | "v2" => 2,
                    "1.1" | "v3" => 3,
                    _ => bail!("the levels are 0.10 (v2) and 1.1 (v3)"),
                };
                self.compat = Some(text()?.to_owned());
            }
            ("compression_type", Format::Qcow2) => {
                options.compression = match text()? {
                    "zlib" => Compression::Zlib,
                    "zstd" => Compression::Zstd,
                    _ => bail!("the types are zlib and zstd"),
                };
            }
            ("lazy_refcounts", Format::Qcow2) => options.lazy_refcounts = switch(value)?,
            ("extended_l2", Format::Qcow2) => options.extended_l2 = switch(value)?,
            ("data_file", Format::Qcow2) => options.data_file = Some(text()?.to_owned()),
            ("data_file_raw", Format::Qcow2) => {
                options.data_file_raw = switch(value)?;
                self.data_file_raw = true;
            }
            ("encryption" | "encrypt.format", Format::Qcow2) => {
                options.encryption = Some(value.unwrap_or("aes").to_owned());
            }
            (_, format) => {
                bail!("{} images have no such option: see -o help", format.name())
            }
        }
        Ok(())
    }

    /// The image to be made, once all that can be left out is known.
    pub(super) fn image(&self) -> NewImage {
        let size = self.size.unwrap_or(0);
        match self.format {
            Format::Raw => NewImage::Raw {
                size,
                preallocation: self.options.preallocation,
            },
            Format::Qcow2 => {
                let backing = self.backing.as_ref().map(|name| {
                    let format = self.backing_format.map(|format| format.name().to_owned());
                    (name.clone(), format)
                });
                NewImage::Qcow2(Box::new(CreateOptions {
                    size,
                    backing,
                    ..self.options.clone()
                }))
            }
        }
    }

    /// The line that tells what is made.
    pub(super) fn describe(&self, path: &str) -> String {
        let options = &self.options;
        let switch = |on: bool| if on { "on" } else { "off" };
        let size = self.size.unwrap_or(0);
        let mut line = format!("Formatting '{path}', fmt={}", self.format.name());
        let mut add = |key: &str, value: &str| {
            // Writing to a string cannot fail.
            let _ = write!(line, " {key}={value}");
        };
        let preallocation = match options.preallocation {
            Preallocation::Off => "off",
            Preallocation::Metadata => "metadata",
            Preallocation::Falloc => "falloc",
            Preallocation::Full => "full",
        };
        let size = size.to_string();
        if self.format == Format::Raw {
            add("size", &size);
            if self.preallocation {
                add("preallocation", preallocation);
            }
            return line;
        }
        add("cluster_size", &options.cluster_size.to_string());
        add("extended_l2", switch(options.extended_l2));
        if self.preallocation {
            add("preallocation", preallocation);
        }
        let compression = match options.compression {
            Compression::Zlib => "zlib",
            Compression::Zstd => "zstd",
        };
        add("compression_type", compression);
        add("size", &size);
        for (key, value) in [
            ("compat", self.compat.as_deref()),
            ("backing_file", self.backing.as_deref()),
            ("backing_fmt", self.backing_format.map(Format::name)),
            ("data_file", options.data_file.as_deref()),
        ] {
            if let Some(value) = value {
                add(key, value);
            }
        }
        if self.data_file_raw {
            add("data_file_raw", switch(options.data_file_raw));
        }
        add("lazy_refcounts", switch(options.lazy_refcounts));
        add("refcount_bits", &options.refcount_bits.to_string());
        line
    }
}

/// Reads the name of a preallocation.
pub(super) fn preallocation(text: &str) -> anyhow::Result<Preallocation> {
    Ok(match text {
        "off" => Preallocation::Off,
        "metadata" => Preallocation::Metadata,
        "falloc" => Preallocation::Falloc,
        "full" => Preallocation::Full,
        _ => bail!("'{text}' is no preallocation: it is off, metadata, falloc or full"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(texts: &[&str]) -> anyhow::Result<Creation> {
        let texts: Vec<String> = texts.iter().map(ToString::to_string).collect();
        Creation::new(Format::Qcow2, &texts)
    }

    #[test]
    fn options_are_read_from_all_lists() {
        let made = all(&[
            "cluster_size=2M,lazy_refcounts",
            "backing_file=a,,b,compat=v3",
        ])
        .unwrap();
        assert_eq!(made.options.cluster_size, 2 << 20);
        assert!(made.options.lazy_refcounts);
        assert_eq!(made.backing.as_deref(), Some("a,b"));
        assert_eq!(
            made.describe("x"),
            "Formatting 'x', fmt=qcow2 cluster_size=2097152 extended_l2=off compression_type=zlib size=0 \
             compat=v3 backing_file=a,b lazy_refcounts=on refcount_bits=16"
        );
    }

    #[test]
    fn a_wrong_option_is_named() {
        for wrong in [
            "foo=1",
            "lazy_refcounts=maybe",
            "compat=2",
            "size",
            "size=1x",
            "preallocation=some",
        ] {
            let error = all(&[wrong]).unwrap_err();
            let key = wrong.split('=').next().unwrap();
            assert!(
                format!("{error:#}").starts_with(&format!("-o {key}: ")),
                "{error:#}"
            );
        }
        assert!(Creation::new(Format::Raw, &["cluster_size=1M".to_owned()]).is_err());
    }
}
