//! A folder that is not as it was exported is refused, with one line that names the file and the key.

use std::fs;
use std::path::Path;

use proptest::prelude::*;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::*;
use crate::hex::hex;
use crate::memory::KnowledgeMemory;

type Change<'a> = &'a dyn Fn(&mut Value);

/// Changes `config.json`.
pub(super) fn edit(folder: &Path, change: impl FnOnce(&mut Value)) {
    let path = folder.join("config.json");
    let mut value: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

/// Takes a component out of `config.json`; its file stays.
pub(super) fn unlist(folder: &Path, component: &str) {
    edit(folder, |value| drop(value["files"].as_object_mut().unwrap().remove(&format!("{component}.safetensors"))));
}

/// Puts other bytes in a component's place, and lists them as if they had been exported.
pub(super) fn replace(folder: &Path, component: &str, bytes: &[u8]) {
    crate::testing::put(folder, component, bytes);
}

/// Other tokenizer, listed as if it had been exported.
fn replace_tokenizer(folder: &Path, json: &str) {
    fs::write(folder.join("tokenizer.json"), json).unwrap();
    edit(folder, |value| {
        value["tokenizer"] = json!({"bytes": json.len(), "sha256": hex(&Sha256::digest(json))});
    });
}

/// The file with its header changed.
fn with_header(bytes: &[u8], change: impl FnOnce(&mut Value)) -> Vec<u8> {
    let (length, rest) = bytes.split_at(8);
    let (header, data) = rest.split_at(usize::try_from(u64::from_le_bytes(length.try_into().unwrap())).unwrap());
    let mut header: Value = serde_json::from_slice(header).unwrap();
    change(&mut header);
    let header = header.to_string();
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// Gives the tensor another name.
fn rename(header: &mut Value, from: &str, to: &str) {
    let tensors = header.as_object_mut().unwrap();
    let tensor = tensors.remove(from).unwrap();
    tensors.insert(to.into(), tensor);
}

/// The message for a folder of the tiny model after `change`.
fn message(change: impl FnOnce(&Path)) -> String {
    let folder = exported(&TinyModel::new());
    change(folder.path());
    let message = Mamba3Jepa::from_dir(folder.path()).err().expect("a damaged folder").to_string();
    assert!(!message.contains('\n'), "{message}");
    message.replace(&format!("{}/", folder.path().display()), "")
}

#[track_caller]
fn assert_says(expected: &[&str], change: impl FnOnce(&Path)) {
    let message = message(change);
    for part in expected {
        assert!(message.contains(part), "{message}\n  expected {part}");
    }
}

#[test]
fn a_missing_file_is_named() {
    for name in ["predictor", "y_encoder", "angn", "y_decoder", "recursion", "x_encoder"] {
        let name = format!("{name}.safetensors");
        assert_says(&[&format!("{name}: cannot be read")], |folder| fs::remove_file(folder.join(&name)).unwrap());
    }
    assert_says(&["tokenizer.json: cannot be read"], |folder| fs::remove_file(folder.join("tokenizer.json")).unwrap());
    assert_says(&["config.json: cannot be read"], |folder| fs::remove_file(folder.join("config.json")).unwrap());
    assert_says(&["config.json: cannot be read"], |folder| fs::remove_dir_all(folder).unwrap());
}

#[test]
fn changed_bytes_are_named() {
    for name in ["predictor.safetensors", "y_decoder.safetensors", "tokenizer.json"] {
        let change = |folder: &Path, change: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = fs::read(folder.join(name)).unwrap();
            change(&mut bytes);
            fs::write(folder.join(name), bytes).unwrap();
        };
        assert_says(&[name, "cut short or changed"], |folder| change(folder, &|bytes| bytes.truncate(bytes.len() / 2)));
        assert_says(&[name, "cut short or changed"], |folder| change(folder, &|bytes| bytes.push(b' ')));
        assert_says(&[name, "has changed since the export"], |folder| {
            change(folder, &|bytes| {
                let last = bytes.len() - 1;
                bytes[last] ^= 1;
            });
        });
    }
    assert_says(&["config.json: cannot be read as JSON"], |folder| {
        let text = fs::read_to_string(folder.join("config.json")).unwrap();
        fs::write(folder.join("config.json"), &text[..text.len() / 2]).unwrap();
    });
    let listed = |key: &'static str, value: Value| {
        move |folder: &Path| edit(folder, |config| config["files"]["recursion.safetensors"][key] = value)
    };
    assert_says(&["recursion.safetensors: has changed"], listed("sha256", json!("00")));
    assert_says(&["recursion.safetensors: ", "config.json says 5: cut short"], listed("bytes", json!(5)));
    assert_says(&["config.json: ", "files: "], listed("bytes", json!(-5)));
}

#[test]
fn a_file_of_another_place_or_model_is_named() {
    let tiny = TinyModel::new();
    let put = |component: &'static str, bytes: Vec<u8>| move |folder: &Path| replace(folder, component, &bytes);
    let says = "predictor.safetensors: its header says";
    assert_says(
        &[says, "component \"y_encoder\", expected \"predictor\""],
        put("predictor", tiny.component("y_encoder")),
    );
    let other = tiny.clone().dtype("float16").component("predictor");
    assert_says(&[says, "dtype \"float16\", expected \"float32\""], put("predictor", other));
    let other = TinyModel { phase: 2, ..tiny.clone() }.component("predictor");
    assert_says(&[says, "phase \"2\", expected \"3\""], put("predictor", other));
    let other = TinyModel { format_version: 1, ..tiny.clone() }.component("predictor");
    assert_says(&[says, "format_version \"1\", expected \"2\""], put("predictor", other));
    let other = tiny.clone().set("/angn/ema_decay", 0.5).component("predictor");
    assert_says(&["predictor.safetensors: it belongs to another model"], put("predictor", other));
    let other = with_header(&tiny.component("predictor"), |header| {
        drop(header["__metadata__"].as_object_mut().unwrap().remove("format"))
    });
    assert_says(&["predictor.safetensors: not a file of a Mamba3-JEPA export"], put("predictor", other));
    assert_says(&["predictor.safetensors: not a safetensors file"], put("predictor", b"{}".to_vec()));
}

#[test]
fn a_wrong_tensor_is_named() {
    let file = TinyModel::new().component("predictor");
    let (key, file) = ("predictor.pred_head.weight", &file);
    let put = |change: &dyn Fn(&mut Value)| {
        let bytes = with_header(file, change);
        move |folder: &Path| replace(folder, "predictor", &bytes)
    };
    let missing = put(&|header| rename(header, key, "predictor.head.weight"));
    assert_says(&["predictor.safetensors: predictor.pred_head.weight: missing"], missing);
    let shape = put(&|header| header[key]["shape"] = json!([32, 24]));
    assert_says(&[key, "expected shape [24, 32], found [32, 24]"], shape);
    let dtype = put(&|header| header[key]["dtype"] = json!("I32"));
    assert_says(&[key, "expected type F32, found I32"], dtype);
    let size = put(&|header| header[key]["shape"] = json!([24, 31]));
    assert_says(&["predictor.safetensors: not a safetensors file, or cut short"], size);
    let extra = put(&|header| {
        let end = header.as_object().unwrap().values().filter_map(|t| t["data_offsets"][1].as_u64()).max();
        header["predictor.more"] = json!({"dtype": "F32", "shape": [0], "data_offsets": [end, end]});
    });
    assert_says(&["predictor.safetensors: predictor.more: not expected"], extra);
    let named = put(&|header| rename(header, key, "predictor.\n\u{1b}[2J"));
    assert_says(&["predictor.pred_head.weight: missing"], named);
    let extra = put(&|header| {
        let end = header.as_object().unwrap().values().filter_map(|t| t["data_offsets"][1].as_u64()).max();
        header["predictor.a\nb"] = json!({"dtype": "F32", "shape": [0], "data_offsets": [end, end]});
    });
    assert_says(&["predictor.safetensors: predictor.a\\nb: not expected"], extra);
}

#[test]
fn every_key_of_the_configuration_is_checked() {
    let cases: [(&[&str], Change<'_>); 40] = [
        (&["not the config.json of a Mamba3-JEPA export"], &|v| v["format"] = json!("other")),
        (&["it has export format 3; this version reads 1 and 2"], &|v| v["format_version"] = json!(3)),
        (&["format_version: "], &|v| v["format_version"] = json!("2")),
        (&["phase: 4, expected 1, 2 or 3"], &|v| v["phase"] = json!(4)),
        (&["files: recursion.safetensors: an export of phase 2 has"], &|v| v["phase"] = json!(2)),
        (&["dtype: \"int8\", expected float32"], &|v| v["dtype"] = json!("int8")),
        (&[".safetensors: its header says dtype \"float32\", expected \"float16\""], &|v| {
            v["dtype"] = json!("float16")
        }),
        (&["files: y_decoder.safetensors is missing; phase 3 has it"], &|v| {
            drop(v["files"].as_object_mut().unwrap().remove("y_decoder.safetensors"))
        }),
        (&["files: ../evil.safetensors: an export of"], &|v| {
            let entry = v["files"]["predictor.safetensors"].clone();
            v["files"]["../evil.safetensors"] = entry;
        }),
        (&["files: missing field `sha256`"], &|v| v["files"]["angn.safetensors"] = json!({"bytes": 1})),
        (&["tokenizer: "], &|v| v["tokenizer"] = json!(null)),
        (&["unknown field `more`"], &|v| v["model"]["more"] = json!(1)),
        (&["missing field `embed_dim`"], &|v| drop(v["model"].as_object_mut().unwrap().remove("embed_dim"))),
        (&["model: predictor.layer: unknown field `more`"], &|v| v["model"]["predictor"]["layer"]["more"] = json!(1)),
        (&["model: vision.depth: invalid type: string \"2\""], &|v| v["model"]["vision"]["depth"] = json!("2")),
        (&["vision.image_size: 4194304 with patches of 8"], &|v| v["model"]["vision"]["image_size"] = json!(1 << 22)),
        (&["vision.image_size: 8192 with patches of 8"], &|v| v["model"]["vision"]["image_size"] = json!(8192)),
        (&["embed_dim: 0 must be"], &|v| v["model"]["embed_dim"] = json!(0)),
        (&["it belongs to another model"], &|v| v["model"]["query_prompt"] = json!("What is it?")),
        (&["knowledge_dim: 5, but the model says 24"], &|v| v["knowledge_dim"] = json!(5)),
        (&["tokenizer.json: pad, bos and eos are [0, 1, 2]"], &|v| v["tokens"]["bos"] = json!(7)),
        (&["tokens: missing field `eos`"], &|v| drop(v["tokens"].as_object_mut().unwrap().remove("eos"))),
        (&["image.size: 64, but the model says 32"], &|v| v["image"]["size"] = json!(64)),
        (&["image: "], &|v| v["image"]["std"] = json!([0.2, 0.0, 0.2])),
        (&["image.resize: "], &|v| v["image"]["resize"] = json!("bilinear")),
        (&["constants.norm_eps: 0.001, but this version computes with 0.00001"], &|v| {
            v["constants"]["norm_eps"] = json!(1e-3)
        }),
        (&["constants.A_floor: missing"], &|v| drop(v["constants"].as_object_mut().unwrap().remove("A_floor"))),
        (&["constants.B_floor: not known to this version"], &|v| v["constants"]["B_floor"] = json!(1.0)),
        (&["classify.temperature: 0, expected a number above 0"], &|v| v["classify"]["temperature"] = json!(0)),
        (&["classify.template: \"a photo\", expected a text with {} in it once"], &|v| {
            v["classify"]["template"] = json!("a photo")
        }),
        (&["classify.template: \"{} {}\", expected"], &|v| v["classify"]["template"] = json!("{} {}")),
        (&["answers: one of them is empty"], &|v| v["answers"] = json!(["red", " \n"])),
        (&["unknown field `a\\nb`"], &|v| v["model"]["a\nb"] = json!(1)),
        (&["image: unknown field `gamma`"], &|v| v["image"]["gamma"] = json!(2.2)),
        (&["tokens: unknown field `unk`"], &|v| v["tokens"]["unk"] = json!(3)),
        (&["classify: unknown field `bias`"], &|v| v["classify"]["bias"] = json!(1)),
        (&["generation: unknown field `top_k`"], &|v| v["generation"]["top_k"] = json!(1)),
        (&["memory: format \"mamba3-jepa memory\", version \"9\""], &|v| v["memory"]["format_version"] = json!("9")),
        (&["answers: "], &|v| v["answers"] = json!([1])),
        (&["generation.max_tokens: 99, but the model's answers have at most 31"], &|v| {
            v["generation"]["max_tokens"] = json!(99)
        }),
    ];
    for (expected, change) in cases {
        assert_says(expected, |folder| edit(folder, change));
    }
    for key in [
        "format",
        "format_version",
        "phase",
        "dtype",
        "files",
        "tokenizer",
        "model",
        "tokens",
        "image",
        "constants",
        "classify",
        "memory",
        "answers",
        "knowledge_dim",
    ] {
        assert_says(&["config.json: ", key], |folder| {
            edit(folder, |value| drop(value.as_object_mut().unwrap().remove(key)));
        });
    }
}

/// Every way to ask the model; each of them ends with an error, of no use are the numbers of the weights.
fn assert_not_finite(model: &Mamba3Jepa, what: &str, reads_texts: bool) {
    let picture = picture(0);
    let sample = || Sample::picture(&picture).asking("Why?");
    let assert = |error: Option<Error>| assert!(matches!(&error, Some(Error::NotFinite(_))), "{what}: {error:?}");
    assert(model.ask(sample()).err());
    assert(model.answerer(AnswererOptions::default()).and_then(|mut answerer| answerer.ask(sample())).err());
    if reads_texts {
        assert(model.embed_text(&["red"]).err());
        assert(KnowledgeMemory::build(model, &["red"], &mut |_, _| {}).err());
    }
}

#[test]
fn weights_that_are_not_finite_give_an_error() {
    for phase in [1, 2, 3] {
        let tiny = TinyModel { phase, ..TinyModel::new().recursion("injector_sees_state", true) };
        for component in tiny.components() {
            for tensor in tiny.tensors(component).iter().map(|tensor| &tensor.key) {
                let folder = exported(&tiny);
                let bytes = tiny.component_with(component, |key, numbers| {
                    if key == tensor {
                        numbers.fill(f32::NAN);
                    }
                });
                replace(folder.path(), component, &bytes);
                let model = match Mamba3Jepa::options().threads(1).open(folder.path()) {
                    Ok(model) => model,
                    Err(error) => {
                        let message = error.to_string();
                        let expected = format!("recursion.safetensors: {tensor}: NaN, expected a finite number");
                        assert!(message.contains(&expected), "{message}");
                        continue;
                    }
                };
                // knowledge is added only where there is some; the Y-Encoder's own tensors count where texts are read
                if tensor.starts_with("recursion.injector.") {
                    let ask = |answerer: &mut Answerer<'_>| {
                        answerer.ask_many(&[Sample::question("Why?")], Some(Knowledge::Text("red")), &mut |_, _| {})
                    };
                    let options = AnswererOptions { inject: Inject::Always, ..Default::default() };
                    let error = ask(&mut model.answerer(options).unwrap()).unwrap_err();
                    assert!(matches!(error, Error::NotFinite(_)), "{tensor}: {error}");
                } else {
                    assert_not_finite(&model, tensor, component == "y_encoder");
                }
                if ["predictor", "angn", "x_encoder"].contains(&component) {
                    let picture = picture(1);
                    let error = model.observe(&[Sample::picture(&picture)]).unwrap_err();
                    assert!(matches!(error, Error::NotFinite(_)), "{tensor}: {error}");
                }
            }
        }
    }
}

#[test]
fn numbers_of_the_recursion_that_cannot_be_used_are_named() {
    for (key, number, expected) in [
        ("confusion_probe.threshold", f32::INFINITY, "inf, expected a finite number"),
        ("confusion_probe.temperature", 0.0, "0, expected a finite number above 0"),
        ("confusion_probe.temperature", -1.0, "-1, expected a finite number above 0"),
        ("confusion_probe.temperature", f32::INFINITY, "inf, expected a finite number above 0"),
        ("memory_floor", f32::NEG_INFINITY, "-inf, expected a finite number"),
    ] {
        let key = format!("recursion.{key}");
        let bytes = TinyModel::new().component_with("recursion", |name, numbers| {
            if name == key {
                numbers.fill(number);
            }
        });
        let expected = format!("recursion.safetensors: {key}: {expected}");
        assert_says(&[&expected], |folder| replace(folder, "recursion", &bytes));
    }
}

#[test]
fn a_large_file_that_is_none_is_refused_before_it_is_read() {
    let sparse = |folder: &Path, name: &str, start: &[u8]| {
        fs::write(folder.join(name), start).unwrap();
        fs::File::options().write(true).open(folder.join(name)).unwrap().set_len(1 << 41).unwrap();
    };
    let whole = TinyModel::new().component("predictor");
    for (start, expected) in [(&b"junkjunkjunk"[..], "not a safetensors file"), (&whole, "more than this crate reads")]
    {
        assert_says(&["predictor.safetensors: ", expected], |folder| {
            sparse(folder, "predictor.safetensors", start);
            edit(folder, |config| config["files"]["predictor.safetensors"]["bytes"] = json!(1_u64 << 41));
        });
    }
    assert_says(&["tokenizer.json: ", "more than a tokenizer has"], |folder| {
        sparse(folder, "tokenizer.json", b"{}");
        edit(folder, |config| config["tokenizer"]["bytes"] = json!(1_u64 << 41));
    });
}

#[test]
fn so_many_threads_are_a_mistake() {
    let folder = exported(&TinyModel::new());
    for n in [0, MAX_THREADS + 1, usize::MAX] {
        let message = Mamba3Jepa::options().threads(n).open(folder.path()).err().unwrap().to_string();
        assert_eq!(message, format!("{n} threads: expected between 1 and 1024"));
    }
}

#[test]
fn a_tokenizer_of_another_model_is_named() {
    let mut other = crate::testing::byte_tokenizer();
    other["model"]["vocab"]["zzz"] = json!(259);
    assert_says(&["tokenizer.json: it has 260 tokens, but config.json says vocab_size 259"], |folder| {
        replace_tokenizer(folder, &other.to_string());
    });
    assert_says(&["tokenizer.json: not a tokenizer.json"], |folder| replace_tokenizer(folder, "{}"));
}

/// Changes bytes of a text.
fn changed(text: &[u8], changes: &[(prop::sample::Index, u8)]) -> Vec<u8> {
    let mut bytes = text.to_vec();
    for (place, byte) in changes {
        let place = place.index(bytes.len());
        bytes[place] = *byte;
    }
    bytes
}

/// A folder that opens also answers, or says why not.
fn open_and_ask(folder: &Path) {
    if let Ok(model) = Mamba3Jepa::options().threads(1).open(folder) {
        let _ = model.ask(Sample::question("What color is it?"));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, max_shrink_iters: 50, ..ProptestConfig::default() })]

    #[test]
    fn no_change_of_the_texts_makes_it_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        is_config in any::<bool>(),
    ) {
        let folder = exported(&TinyModel::new());
        let name = if is_config { "config.json" } else { "tokenizer.json" };
        let bytes = changed(&fs::read(folder.path().join(name)).unwrap(), &changes);
        match String::from_utf8(bytes.clone()) {
            Ok(json) if !is_config => replace_tokenizer(folder.path(), &json),
            _ => fs::write(folder.path().join(name), bytes).unwrap(),
        }
        open_and_ask(folder.path());
    }

    #[test]
    fn no_change_of_a_header_makes_it_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        component in prop::sample::select(crate::testing::COMPONENTS.to_vec()),
    ) {
        let tiny = TinyModel::new();
        let folder = exported(&tiny);
        let file = tiny.component(component);
        let header = 8 + usize::try_from(u64::from_le_bytes(file[..8].try_into().unwrap())).unwrap();
        let bytes = [&changed(&file[..header], &changes), &file[header..]].concat();
        replace(folder.path(), component, &bytes);
        open_and_ask(folder.path());
    }
}
