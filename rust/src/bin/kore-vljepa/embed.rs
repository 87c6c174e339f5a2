//! `kore-vljepa embed`: embeddings of images and texts to a file.

use std::path::{Path, PathBuf};

use kore_vljepa::files::{demand_writable, path_text, write_whole};
use kore_vljepa::loader::{NewTensor, write_safetensors};
use kore_vljepa::npy::write_npy;
use kore_vljepa::vljepa::{ImageEmbeddings, Options};
use serde_json::json;

use crate::args::{ModelArgs, texts_or_file};
use crate::images::ImageArgs;
use crate::output::{Failure, failure, print, printable, progress, shown, without_dots};

const FORMAT: &str = "mamba3-jepa embeddings";

/// Write the embeddings of images or texts to a .npy or .safetensors file.
#[derive(clap::Args)]
pub(crate) struct Embed {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    images: ImageArgs,
    /// A .npy file, with the names in a .json file beside it, or a .safetensors file that holds the names too.
    #[arg(long, value_name = "PATH")]
    output: PathBuf,
    /// Texts, or one text file with a text a line: embedded by the Y-Encoder as answers are.
    #[arg(long, value_name = "TEXT", num_args = 0.., allow_negative_numbers = true)]
    texts: Vec<String>,
    /// Ask this about the images; default: the prompt for describing them.
    #[arg(long, value_name = "TEXT", allow_negative_numbers = true)]
    question: Option<String>,
}

/// N images or texts with their embeddings (N, E), and what the group of them is called.
struct Group {
    name: &'static str,
    names: Vec<String>,
    embeddings: Vec<f32>,
}

impl Embed {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let options = self.check()?;
        demand_writable([&self.output])?;
        let paths = if self.images.are_given() { self.images.find()? } else { Vec::new() };
        let texts = texts_or_file(&self.texts, "text", "texts")?;
        let model = self.model.open_with(options)?;
        let mut groups: Vec<Group> = Vec::new();
        if !paths.is_empty() {
            let ImageEmbeddings { paths, embeddings, .. } =
                self.images.embed(&model, &paths, self.question.as_deref())?;
            groups.push(Group { name: "images", names: paths.iter().map(path_text).collect(), embeddings });
        }
        if !texts.is_empty() {
            let embeddings = model.embed_text_with(&texts, &mut progress("texts"))?.concat();
            groups.push(Group { name: "texts", names: texts, embeddings });
        }
        let width = model.config().embed_dim;
        let written = write_embeddings(&without_dots(&self.output), &groups, width)?;
        let counts: Vec<String> = groups.iter().map(|group| format!("{} {}", group.names.len(), group.name)).collect();
        let files: Vec<String> = written.iter().map(|path| shown(path)).collect();
        let line = format!("{}, {width} numbers each: {}", counts.join(" and "), files.join(", "));
        print(&printable(&line))
    }

    /// Refuses contradictory or impossible settings.
    fn check(&self) -> Result<Options, Failure> {
        let options = self.images.options()?;
        let has_images = self.images.are_given();
        let output = shown(&self.output);
        if !has_images && self.texts.is_empty() {
            return Err(failure("nothing to embed: give --images, --image-dir or --texts"));
        }
        match self.output.extension().and_then(|suffix| suffix.to_str()) {
            Some("safetensors") => {}
            Some("npy") if has_images && !self.texts.is_empty() => {
                return Err(failure(format!(
                    "--output {output}: one array holds images or texts; for both write .safetensors"
                )));
            }
            Some("npy") => {}
            _ => return Err(failure(format!("--output {output}: its name must end in .npy or .safetensors"))),
        }
        if self.question.is_some() && !has_images {
            return Err(failure("--question is asked about images; there are none"));
        }
        Ok(options)
    }
}

/// Writes embeddings (N, `width`), each file whole or not at all; returns the files written.
///
/// `.safetensors`: a tensor for each group by its name, and its names as a JSON list in the metadata. `.npy`: the array
/// of the only group, with the names in a `.json` file beside it.
fn write_embeddings(path: &Path, groups: &[Group], width: usize) -> Result<Vec<PathBuf>, Failure> {
    if let (Some("npy"), [group]) = (path.extension().and_then(|suffix| suffix.to_str()), groups) {
        let names = path.with_extension("json");
        if names.is_dir() {
            return Err(failure(format!(
                "{} is a folder where the names are to go; choose another --output",
                shown(&names)
            )));
        }
        write_npy(path, &group.embeddings, width)?;
        let json = format!("{:#}\n", json!({ group.name: group.names }));
        write_whole(&names, |out| out.write_all(json.as_bytes()))?;
        return Ok(vec![path.to_path_buf(), names]);
    }
    let lists: Vec<(&str, String)> = groups.iter().map(|group| (group.name, list(&group.names))).collect();
    let mut metadata = vec![("format", FORMAT)];
    metadata.extend(lists.iter().map(|(name, list)| (*name, list.as_str())));
    let shapes: Vec<[usize; 2]> = groups.iter().map(|group| [group.names.len(), width]).collect();
    let tensors: Vec<NewTensor<'_>> = groups
        .iter()
        .zip(&shapes)
        .map(|(group, shape)| NewTensor { name: group.name, shape, numbers: &group.embeddings })
        .collect();
    write_safetensors(path, &tensors, &metadata)?;
    Ok(vec![path.to_path_buf()])
}

/// A JSON list as Python's `json.dumps` writes it.
fn list(names: &[String]) -> String {
    let names: Vec<String> = names.iter().map(|name| json!(name).to_string()).collect();
    format!("[{}]", names.join(", "))
}
