//! The command as a user meets it: arguments, files and what is printed, on a tiny exported model.

mod common;

use std::fs;
use std::io::pipe;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::TinyModel;
use kore_vljepa::loader::{NewTensor, load_safetensors, write_safetensors};
use kore_vljepa::vljepa::{Mamba3Jepa, Sample};
use serde_json::{Value, json};
use tempfile::TempDir;

/// What a run of the command left.
struct Run {
    status: i32,
    stdout: String,
    stderr: String,
}

impl Run {
    /// What a successful run printed as JSON.
    fn json(&self) -> Value {
        assert_eq!((self.status, self.stderr.as_str()), (0, ""), "{}", self.stdout);
        serde_json::from_str(&self.stdout).expect("JSON")
    }

    /// Demands an error of the user's that contains `message`.
    fn refuses(&self, message: &str) {
        let Run { status, stdout, stderr } = self;
        assert_eq!((*status, stdout.as_str()), (2, ""), "{message}: {stderr}");
        assert!(stderr.starts_with("error: ") && stderr.contains(message), "{message}: {stderr}");
    }

    /// Demands an error of the user's, in one line that contains `message`.
    fn fails_with(&self, message: &str) {
        self.refuses(message);
        assert_eq!(self.stderr.matches('\n').count(), 1, "{}", self.stderr);
    }
}

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kore-vljepa"));
    command.args(arguments).stdin(Stdio::null());
    command
}

fn run(arguments: &[&str]) -> Run {
    let output = command(arguments).output().expect("the command starts");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    Run {
        status: output.status.code().expect("it ends by itself"),
        stdout: text(output.stdout),
        stderr: text(output.stderr),
    }
}

/// An exported model, and pictures in a folder and in one below it, beside a file that is none.
struct Scene {
    folder: TempDir,
}

impl Scene {
    fn new() -> Scene {
        Self::with(&TinyModel::new())
    }

    fn with(model: &TinyModel) -> Scene {
        let scene = Scene { folder: tempfile::tempdir().expect("a folder") };
        model.write(&scene.path("weights"));
        fs::create_dir_all(scene.path("photos/below")).expect("a folder");
        for (name, colour) in [("red", [255, 0, 0]), ("blue", [0, 0, 255]), ("below/white", [255; 3])] {
            write_picture(&scene.path(&format!("photos/{name}.png")), colour);
        }
        fs::write(scene.path("photos/notes.txt"), "no image").expect("a file");
        scene
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().expect("UTF-8").to_owned()
    }

    /// Puts other bytes in a component's place, as if they had been exported.
    fn put(&self, component: &str, bytes: &[u8]) {
        common::put(&self.path("weights"), component, bytes);
    }

    fn model(&self) -> Mamba3Jepa {
        Mamba3Jepa::from_dir(self.path("weights")).expect("a model")
    }

    /// Runs `command` with this model; a `@` at the start of an argument stands for the scene's folder.
    fn run(&self, command: &str, arguments: &[&str]) -> Run {
        let weights = self.text("weights");
        let arguments: Vec<String> = arguments
            .iter()
            .map(|argument| argument.strip_prefix('@').map_or_else(|| (*argument).to_owned(), |name| self.text(name)))
            .collect();
        let all = [command, "--weights", &weights, "--threads", "1"].into_iter();
        run(&all.chain(arguments.iter().map(String::as_str)).collect::<Vec<_>>())
    }
}

/// A picture of 40 x 30 pixels, half of it in this colour and half of it black.
fn write_picture(path: &Path, colour: [u8; 3]) {
    let mut encoder = png::Encoder::new(fs::File::create(path).expect("a file"), 40, 30);
    encoder.set_color(png::ColorType::Rgb);
    let pixels: Vec<u8> = [colour.repeat(600), vec![0; 1800]].concat();
    encoder.write_header().expect("a header").write_image_data(&pixels).expect("pixels");
}

fn close(found: &Value, expected: f64) {
    let found = found.as_f64().expect("a number");
    assert!((found - expected).abs() < 1e-5, "{found} is not {expected}");
}

#[test]
fn help_and_version() {
    for command in ["ask", "agent", "embed", "search", "classify", "inspect", "verify", "bench"] {
        let Run { status, stdout, .. } = run(&[command, "--help"]);
        assert_eq!(status, 0);
        assert!(stdout.contains("Usage: kore-vljepa"), "{stdout}");
        assert!(run(&["--help"]).stdout.contains(command));
    }
    assert!(run(&["--version"]).stdout.starts_with("kore-vljepa "));
}

#[test]
fn wrong_arguments_are_errors_of_the_users() {
    for (arguments, message) in [
        (&[][..], "Usage"),
        (&["paint"], "paint"),
        (&["ask", "what?"], "--weights"),
        (&["agent", "what?"], "--weights"),
        (&["agent", "--weights", "w", "--max-rounds", "many", "what?"], "many"),
        (&["agent", "--weights", "w", "--top", "3", "what?"], "--top"),
        (&["embed", "--weights", "w"], "--output"),
        (&["classify", "--weights", "w"], "--labels"),
        (&["ask", "--weights", "w", "--top", "many", "what?"], "many"),
        (&["ask", "--weights", "w", "--method", "guess", "what?"], "guess"),
        (&["ask", "--weights", "w", "--checkpoint", "c.pt", "what?"], "--checkpoint"),
        (&["search", "--weights", "w", "--on-bad-sample", "ignore", "red"], "ignore"),
        (&["inspect"], "PATH"),
    ] {
        let Run { status, stdout, stderr } = run(arguments);
        assert_eq!((status, stdout.as_str()), (2, ""), "{arguments:?}");
        assert!(stderr.contains(message), "{arguments:?}: {stderr}");
    }
}

#[cfg(unix)]
#[test]
fn arguments_that_are_no_text_are_answered() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    let strange = OsStr::from_bytes(b"\xff\xfe");
    for arguments in [["inspect"].as_slice(), &["ask", "--weights", "w"], &["search", "--weights", "w", "--images"]] {
        let output = command(arguments).arg(strange).output().expect("the command starts");
        let stderr = String::from_utf8(output.stderr).expect("UTF-8");
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {stderr}");
        assert!(stderr.starts_with("error: "), "{stderr}");
    }
}

#[test]
fn a_value_that_is_no_number_is_an_error_in_one_line() {
    for (flag, value) in [("--max-tokens", "None"), ("--top-p", "none"), ("--seed", "null"), ("--top", "1.5")] {
        run(&["ask", "--weights", "w", "what?", flag, value])
            .fails_with(&format!("invalid value '{value}' for '{flag}"));
    }
}

#[test]
fn an_option_that_takes_one_value_is_given_once() {
    let scene = Scene::new();
    let twice = ["--images", "@photos/red.png", "--images", "@photos/blue.png"];
    let rest = "is given twice, and only one value counts: leave one of them out\n";
    for (command, arguments, flag) in [
        ("ask", &["what?", "--top", "0", "--top", "3"][..], "--top"),
        ("ask", &["what?", "--max_tokens=2", "--max-tokens", "2"], "--max-tokens"),
        ("ask", &["what?", "--inject", "always", "--inject", "always"], "--inject"),
        ("search", &[&["red", "--image-dir", "a", "--image-dir", "b"], &twice[..]].concat(), "--image-dir"),
        ("classify", &[&["--labels", "a", "--threads", "2"], &twice[..]].concat(), "--threads"),
    ] {
        let refused = scene.run(command, arguments);
        refused.fails_with(rest);
        assert_eq!(refused.stderr, format!("error: {flag} {rest}"));
    }
    let found = scene.run("search", &[&["red", "--json", "--json"], &twice[..]].concat()).json();
    assert_eq!(found["images_searched"], json!(2));
    let labels = ["--labels", "red", "blue", "--labels", "-5", "white", "--json"];
    let found = scene.run("classify", &[&twice[..], &labels].concat()).json();
    assert_eq!(found[1]["labels"].as_array().expect("a list").len(), 4);
    assert!(found.to_string().contains("\"-5\""), "{found}");
    let embed = scene.run("embed", &["--output", "@x.npy", "--texts", "red", "--texts", "blue", "white"]);
    assert_eq!(embed.status, 0, "{}", embed.stderr);
    let names: Value = serde_json::from_slice(&fs::read(scene.path("x.json")).expect("a file")).expect("JSON");
    assert_eq!(names, json!({"texts": ["red", "blue", "white"]}));
}

#[test]
fn the_name_of_a_file_that_is_not_there_is_no_text() {
    let scene = Scene::new();
    let images = ["--images", "@photos/red.png"];
    for (command, arguments, message) in [
        ("embed", &["--output", "@x.npy", "--texts", "nofile.txt"][..], "--texts nofile.txt: there is no such file"),
        ("embed", &["--output", "@x.npy", "--texts", "@photos"], "photos: it is no file"),
        (
            "classify",
            &[&images[..], &["--labels", "nofile.csv"]].concat(),
            "--labels nofile.csv: there is no such file",
        ),
    ] {
        scene.run(command, arguments).fails_with(message);
    }
    assert!(!scene.path("x.npy").exists());
}

#[cfg(unix)]
#[test]
fn names_that_are_no_text_open_and_are_escaped() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    let scene = Scene::new();
    let folder = scene.path("strange");
    fs::create_dir(&folder).expect("a folder");
    for (name, colour) in [(&b"gr\xfcn.png"[..], [0, 255, 0]), (b"gr\xc3\xbcn.png", [0, 200, 0])] {
        write_picture(&folder.join(OsStr::from_bytes(name)), colour);
    }
    let names = json!([scene.text("strange/gr\u{fc}n.png"), scene.text("strange/gr\\xfcn.png")]);
    let given = ["--image-dir", "@strange"];
    let found =
        scene.run("search", &[&["green", "--json", "--contact-sheet", "@sheet.png"], &given[..]].concat()).json();
    assert_eq!(found["results"].as_array().expect("a list").len(), 2);
    assert!(found["results"].to_string().contains(r"gr\\xfcn.png"), "{found}");
    assert!(kore_vljepa::image::load_image(scene.path("sheet.png")).is_ok());
    let found = scene.run("classify", &[&["--labels", "a", "b", "--json"], &given[..]].concat()).json();
    assert_eq!(json!([found[0]["image"], found[1]["image"]]), names);
    assert_eq!(scene.run("embed", &[&["--output", "@x.npy"], &given[..]].concat()).status, 0);
    let written: Value = serde_json::from_slice(&fs::read(scene.path("x.json")).expect("a file")).expect("JSON");
    assert_eq!(written, json!({ "images": names }));
    assert_eq!(scene.run("embed", &[&["--output", "@x.safetensors"], &given[..]].concat()).status, 0);
    let written = load_safetensors(scene.path("x.safetensors")).expect("a file");
    assert_eq!(serde_json::from_str::<Value>(&written.metadata()["images"]).expect("JSON"), names);
    let weights = scene.text("weights");
    let mut missing = command(&["search", "green", "--weights", &weights, "--images"]);
    let stderr = missing.arg(OsStr::from_bytes(b"\xff.png")).output().expect("the command starts").stderr;
    assert_eq!(String::from_utf8_lossy(&stderr), "error: \\xff.png: there is no such image file\n");
}

#[cfg(unix)]
#[test]
fn a_signal_ends_the_command_with_its_number() {
    let scene = Scene::new();
    let pipe = scene.path("pipe.json");
    assert!(Command::new("mkfifo").arg(&pipe).status().expect("it starts").success());
    let before = fs::read_dir(scene.folder.path()).expect("a folder").count();
    for (signal, status) in [("INT", 130), ("TERM", 143)] {
        let arguments = ["ask", "--weights", &scene.text("weights"), "what?", "--knowledge-vector"];
        let mut running = command(&arguments).arg(&pipe).stderr(Stdio::piped()).spawn().expect("the command starts");
        let _writer = fs::File::options().write(true).open(&pipe).expect("the command reads");
        let id = running.id().to_string();
        assert!(Command::new("kill").args([&format!("-{signal}"), &id]).status().expect("it starts").success());
        assert_eq!(running.wait().expect("it ends").code(), Some(status));
    }
    assert_eq!(fs::read_dir(scene.folder.path()).expect("a folder").count(), before);
}

#[test]
fn a_closed_pipe_ends_the_command_quietly() {
    let scene = Scene::new();
    let file = scene.text("weights/angn.safetensors");
    for arguments in [&["--help"][..], &["inspect", &file], &["inspect", &file, "--json"]] {
        let (reader, writer) = pipe().expect("a pipe");
        drop(reader);
        let output = command(arguments).stdout(writer).stderr(Stdio::piped()).output().expect("the command starts");
        assert_eq!(output.status.code(), Some(141), "{arguments:?}");
        assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{arguments:?}");
    }
    let (reader, writer) = pipe().expect("a pipe");
    drop(reader);
    let status = command(&["inspect", "nothing"]).stderr(writer).status().expect("the command starts");
    assert_eq!(status.code(), Some(2));
}

#[test]
fn inspect_says_what_a_file_holds() {
    let scene = Scene::new();
    let file = scene.text("weights/angn.safetensors");
    let found = run(&["inspect", &file, "--json"]);
    let keys: Vec<usize> = ["file", "bytes", "kind", "metadata", "tensors", "parameters"]
        .iter()
        .map(|key| found.stdout.find(&format!("\n  \"{key}\": ")).expect(key))
        .collect();
    assert!(keys.is_sorted(), "{}", found.stdout);
    let found = found.json();
    assert_eq!(found["file"], json!(file));
    assert_eq!(found["bytes"], json!(fs::metadata(&file).expect("a file").len()));
    assert_eq!(found["metadata"]["config"], TinyModel::new().config);
    assert_eq!(found["metadata"]["phase"], "3");
    assert_eq!(found["tensors"][0], json!({"name": "angn.gates.0.bias", "dtype": "F32", "shape": [32]}));
    assert_eq!(found["parameters"], json!({"angn": 128, "total": 128}));
    let shown = run(&["inspect", &file]).stdout;
    for word in ["config.predictor.layer.d_state", "angn.gates.1.weight", "component", "total"] {
        assert!(shown.contains(word), "{word}: {shown}");
    }
    let nested = r#"{"z":1,"a":{"y":2,"b":[{"d":3,"c":4}]}}"#;
    let path = scene.path("nested.safetensors");
    write_safetensors(&path, &[NewTensor { name: "x", shape: &[1], numbers: &[0.0] }], &[("about", nested)])
        .expect("written");
    let found = run(&["inspect", path.to_str().expect("UTF-8"), "--json"]).json();
    assert_eq!(found["metadata"]["about"].to_string(), nested, "the order is the file's");
}

#[test]
fn what_cannot_be_inspected() {
    let scene = Scene::new();
    fs::write(scene.path("text.safetensors"), "not at all").expect("a file");
    fs::write(scene.path("torch.bin"), b"PK\x03\x04rest").expect("a file");
    let file = fs::read(scene.path("weights/angn.safetensors")).expect("a file");
    fs::write(scene.path("cut.safetensors"), &file[..file.len() - 1]).expect("a file");
    let weights = scene.text("weights");
    for (file, message) in [
        (scene.text("nothing"), "there is no such file"),
        (weights, "is a folder, it holds angn.safetensors, predictor.safetensors"),
        (scene.text("text.safetensors"), "not a safetensors file, or cut short"),
        (scene.text("cut.safetensors"), "not a safetensors file, or cut short"),
        (scene.text("torch.bin"), "`mamba3-jepa inspect` (Python) reads it"),
    ] {
        run(&["inspect", &file]).fails_with(message);
    }
}

#[test]
fn ask_answers_as_the_library_does() {
    let scene = Scene::new();
    let questions = ["What colour is the circle?", "größer?"];
    let found = scene.run("ask", &["--image", "@photos/red.png", questions[0], questions[1], "--json", "--top", "2"]);
    let warning = "\"größer?\": the tokenizer has not seen the characters öß in training; the answer means little";
    assert_eq!((found.status, found.stderr), (0, format!("WARNING {warning}\n")));
    let found: Value = serde_json::from_str(&found.stdout).expect("JSON");
    let model = scene.model();
    let picture = scene.path("photos/red.png");
    for (values, question) in found.as_array().expect("a list").iter().zip(questions) {
        let expected = model.ask(Sample::file(&picture).asking(question)).expect("an answer");
        assert_eq!(values["question"], question);
        assert_eq!(values["text"], json!(expected.text));
        assert_eq!(values["confused"], json!(expected.confused));
        close(&values["confidence"], expected.confidence);
        close(&values["confusion"], expected.confusion.expect("a score").into());
        assert_eq!(values["nearest"].as_array().expect("a list").len(), 2);
        assert_eq!(values["nearest"][0]["text"], json!(expected.nearest[0].0));
        close(&values["nearest"][0]["cosine"], expected.nearest[0].1.into());
        assert_eq!(values["memory_used"], Value::Null);
        assert_eq!(values["threshold"], json!(0.5));
        assert_eq!((&values["sure"], &values["knowledge_used"]), (&json!(expected.sure), &json!(false)));
        assert_eq!(values["signal"], json!(expected.confused.filter(|&confused| confused).map(|_| "state")));
        assert_eq!(values["warnings"], json!(expected.warnings));
        let keys = ["question", "text", "confidence", "confusion", "smoothed_confusion", "confused", "nearest"];
        assert!(keys.iter().all(|key| values.get(key).is_some()));
    }
    let shown = scene.run("ask", &["--image", "@photos/red.png"]).stdout;
    for word in ["Describe the image.", "confidence", "confusion", "memory", "nearest known answers"] {
        assert!(shown.contains(word), "{word}: {shown}");
    }
}

#[test]
fn ask_in_every_phase_and_in_every_way_of_speaking() {
    for phase in 1..=3 {
        let scene = Scene::with(&TinyModel { phase, ..TinyModel::new() });
        let found = scene.run("ask", &["--image", "@photos/red.png", "-5", "--json"]).json();
        assert_eq!(found[0]["question"], "-5");
        for key in ["confusion", "smoothed_confusion", "threshold", "confused", "sure"] {
            assert_eq!(found[0][key].is_null(), phase < 3, "{key}");
        }
        assert_eq!(found[0]["knowledge_used"], json!(false));
    }
    let scene = Scene::new();
    let greedy = scene.run("ask", &["what?", "--json"]).json();
    for settings in [
        &["--method", "sample", "--temperature", "0"][..],
        &["--method=sample", "--top_k", "1"],
        &["--method", "beam", "--beams", "1", "--length-penalty", "-0.5"],
    ] {
        let found = scene.run("ask", &[&["what?", "--json"], settings].concat()).json();
        assert_eq!(found[0]["text"], greedy[0]["text"], "{settings:?}");
    }
    let short = scene.run("ask", &["what?", "--json", "--max-tokens", "1"]).json();
    assert!(short[0]["text"].as_str().expect("a text").chars().count() <= 1);
}

#[test]
fn ask_with_a_memory_and_with_knowledge() {
    let scene = Scene::with(&TinyModel { seed: 3, ..TinyModel::new() });
    fs::write(scene.path("facts.txt"), "the circle is red\n\nthere is no square\nthe circle is red\n").expect("a file");
    let arguments = ["--image", "@photos/red.png", "what?", "where?", "who?", "--json"];
    let by = |more: &[&str]| scene.run("ask", &[&arguments[..], more].concat()).json();
    let built = by(&["--memory", "@facts.txt", "--save-memory", "@new/facts.safetensors"]);
    assert_eq!(built, by(&["--memory", "@new/facts.safetensors"]));
    let saved = load_safetensors(scene.path("new/facts.safetensors")).expect("a memory");
    assert_eq!(saved.metadata()["texts"], r#"["the circle is red", "there is no square"]"#);
    for answer in built.as_array().expect("a list") {
        assert_eq!(answer["memory_used"].is_string(), answer["confused"] == json!(true));
        assert_eq!(answer["sure"], json!(true));
    }

    let vector = scene.model().embed_text(&["the circle is red"]).expect("an embedding").concat();
    fs::write(scene.path("vector.json"), json!(vector).to_string()).expect("a file");
    let header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({},), }}\n", vector.len());
    let length = u16::try_from(header.len()).expect("a short header").to_le_bytes();
    let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
    fs::write(scene.path("vector.npy"), [b"\x93NUMPY\x01\x00", &length[..], header.as_bytes(), &bytes].concat())
        .expect("a file");
    let plain = by(&[]);
    for always in [false, true] {
        let more = if always { &["--inject", "always"][..] } else { &[] };
        let by = |knowledge: &[&str]| by(&[knowledge, more].concat());
        let by_text = by(&["--knowledge", "the circle is red"]);
        assert_eq!(by_text, by(&["--knowledge-vector", "@vector.npy"]));
        assert_eq!(by_text, by(&["--knowledge-vector", "@vector.json"]));
        for (told, plain) in by_text.as_array().expect("a list").iter().zip(plain.as_array().expect("a list")) {
            let is_used = always || plain["confused"] == json!(true);
            assert_eq!((&told["knowledge_used"], &told["sure"]), (&json!(is_used), &json!(true)));
            assert_eq!(told["nearest"] != plain["nearest"], is_used);
        }
    }
    scene.run("ask", &["what?", "--inject", "never"]).refuses("never");
}

#[test]
fn what_is_said_of_confusion_on_the_screen() {
    let scene_with = |threshold: f32, hears: bool| {
        let model = if hears { TinyModel::new().recursion("hears_answer", true) } else { TinyModel::new() };
        let scene = Scene::with(&model);
        let recursion = model.component_with("recursion", |key, numbers| match key {
            "recursion.confusion_probe.threshold" => numbers[0] = threshold,
            // a doubt makes it confused: more of it, more confusion
            "recursion.confusion_probe.hidden.weight" if hears => {
                for row in numbers.chunks_mut(34) {
                    row.fill(0.0);
                    row[32] = 1.0;
                }
            }
            "recursion.confusion_probe.linear.weight" if hears => numbers.fill(0.2),
            _ => {}
        });
        scene.put("recursion", &recursion);
        scene
    };
    let lines = |scene: &Scene, more: &[&str]| -> Vec<String> {
        let shown = scene.run("ask", &[&["what?"], more].concat());
        assert_eq!((shown.status, shown.stderr.as_str()), (0, ""));
        shown.stdout.lines().map(String::from).collect()
    };
    let confused = scene_with(0.0, false);
    let said = lines(&confused, &[]);
    assert!(said[1].starts_with("  not sure: "), "{said:?}");
    assert!(said[2].starts_with("  confusion 0.") && said[3].is_empty(), "{said:?}");
    assert!(said[2].ends_with(" over the threshold 0.00: this picture and question are not like those it knows"));
    let told = lines(&confused, &["--knowledge", "it is red"]);
    assert!(!told[1].contains("not sure") && told[2].is_empty(), "{told:?}");
    assert!(told.iter().any(|line| line.trim().starts_with("knowledge") && line.ends_with("used")));

    let calm = scene_with(1.0, false);
    assert!(lines(&calm, &[])[2].is_empty());
    let told = lines(&calm, &["--knowledge", "it is red"]);
    assert_eq!(told[2], "  not confused: the knowledge was not used (--inject always uses it)");
    assert!(lines(&calm, &["--knowledge", "it is red", "--inject", "always"])[2].is_empty());

    let hears = scene_with(0.9, true);
    let said = lines(&hears, &["--smooth", "--smooth"]);
    assert!(said[2].ends_with(": the decoder hesitates over its answer"), "{said:?}");
    assert_eq!(hears.run("ask", &["what?", "--json"]).json()[0]["signal"], json!("answer"));
}

#[test]
fn ask_with_bad_input() {
    let scene = Scene::new();
    fs::write(scene.path("fake.png"), "this is no image").expect("a file");
    fs::write(scene.path("empty.txt"), "\n").expect("a file");
    fs::write(scene.path("words.json"), r#"["red"]"#).expect("a file");
    fs::write(scene.path("short.json"), "[1, 2.5]").expect("a file");
    fs::write(scene.path("text.npy"), "not numpy").expect("a file");
    for (arguments, message) in [
        (&["--image", "@fake.png"][..], "fake.png: "),
        (&["--image", "@nowhere.png"], "there is no such image file"),
        (&["  "], "is empty"),
        (&[], "nothing to ask"),
        (&["x?", "--device", "cuda"], "--device cuda: not available here"),
        (&["x?", "--knowledge-vector", "/dev/null"], "not a knowledge vector"),
        (&["x?", "--answers", "@empty.txt"], "has no text"),
        (&["x?", "--answers", "@nowhere.txt"], "cannot read it"),
        (&["x?", "--memory", "@empty.txt"], "has no text"),
        (&["x?", "--memory", "@nowhere.safetensors"], "cannot be read"),
        (&["x?", "--knowledge-vector", "@short.json"], "length 2, but this model takes length 24"),
        (&["x?", "--knowledge-vector", "@words.json"], "not a knowledge vector"),
        (&["x?", "--knowledge-vector", "@text.npy"], "not a .npy file"),
        (&["x?", "--knowledge-vector", "@nowhere.npy"], "cannot read"),
        (&["x?", "--knowledge", "a", "--knowledge-vector", "@short.json"], "exclude each other"),
        (&["x?", "--knowledge", "a", "--memory", "@facts.txt"], "--memory is looked up when there is no"),
        (&["x?", "--inject", "always"], "--inject always: there is nothing to inject; give --knowledge or"),
        (&["x?", "--save-memory", "m.safetensors"], "needs a --memory"),
        (&["x?", "--memory", "m.txt", "--save-memory", "m.npy"], "must end in .safetensors"),
        (&["x?", "--beams", "3"], "beams has no effect with greedy"),
        (&["x?", "--max-tokens", "-1"], "max_tokens is -1, it must be at least 1 and at most 1000000"),
        (&["x?", "--method", "beam", "--beams", "1001"], "beams is 1001, it must be at least 1 and at most 1000"),
        (&["x?", "--method", "beam", "--beams", "260"], "beams is 260, but the model has only 259 tokens"),
        (&["x?", "--method", "sample", "--top-k", "260"], "top_k is 260, but the model has only 259 tokens"),
        (&["x?", "--top", "0"], "--top 0: must be at least 1"),
    ] {
        scene.run("ask", arguments).fails_with(message);
    }
    let weights = scene.text("weights");
    for threads in ["0", "1025"] {
        run(&["ask", "--weights", &weights, "x?", "--threads", threads])
            .fails_with(&format!("--threads {threads}: must be at least 1 and at most 1024"));
    }
    fs::remove_file(scene.path("weights/predictor.safetensors")).expect("a file to remove");
    scene.run("ask", &["x?"]).fails_with("predictor.safetensors");
    let nowhere = scene.text("nowhere");
    run(&["ask", "--weights", &nowhere, "x?"]).fails_with("nowhere");
}

#[cfg(unix)]
#[test]
fn agent_calls_tools_and_writes_the_trace() {
    let names = ["abacus", "memory", "oracle"];
    let model = TinyModel::new().recursion("weighs_knowledge", true).recursion("tools", json!(names));
    let scene = Scene::with(&model);
    let recursion = model.component_with("recursion", |key, numbers| match key.trim_start_matches("recursion.") {
        "tool_selector.linear.weight" | "knowledge_probe.linear.weight" => numbers.fill(0.0),
        "tool_selector.linear.bias" => numbers.copy_from_slice(&[0.0, 0.5, 1.0]),
        "knowledge_probe.linear.bias" => numbers.fill(-3.0), // whatever is told is put back
        "confusion_probe.threshold" => numbers.fill(0.0),
        _ => {}
    });
    scene.put("recursion", &recursion);
    fs::write(scene.path("facts.txt"), "the circle is red\n").expect("a file");
    let script = r#"[ "${1#/}" != "$1" ] && printf '%s %s' "${0%% *}" "${1##*/}""#; // of an absolute path
    let tools = json!({"tools": {
        "abacus": {"command": ["sh", "-c", script, "{question}", "{image}"]},
        "oracle": {"command": ["sh", "-c", "echo 'no such thing' >&2; exit 2"]},
    }});
    fs::write(scene.path("tools.json"), tools.to_string()).expect("a file");
    let asked = ["--image", "@photos/red.png", "--tools", "@tools.json", "--memory", "@facts.txt"];
    let questions = ["What colour is the circle?", "Is there a square?"];
    let found =
        scene.run("agent", &[&asked[..], &questions, &["--json", "--trace", "@new/trace.json"]].concat()).json();
    let written = fs::read_to_string(scene.path("new/trace.json")).expect("a trace");
    assert_eq!(serde_json::from_str::<Value>(&written).expect("JSON"), found);
    assert!(written.ends_with("]\n"));
    let plain = scene.run("ask", &[&asked[..2], &questions, &["--json"]].concat()).json();
    for ((each, question), plain) in
        found.as_array().expect("a list").iter().zip(questions).zip(plain.as_array().unwrap())
    {
        let keys: Vec<&String> = each.as_object().expect("an object").keys().collect();
        let expected =
            ["question", "text", "confidence", "confused", "sure", "nearest", "warnings", "stopped", "tools", "trace"];
        assert_eq!(keys, expected);
        for key in ["question", "text", "confidence", "confused", "sure", "nearest", "warnings"] {
            assert_eq!(each[key], plain[key], "{key}: nothing that was told is kept");
        }
        assert_eq!((&each["stopped"], &each["tools"]), (&json!("no tool"), &json!(["oracle", "memory", "abacus"])));
        let trace = each["trace"].as_array().expect("a list");
        let steps: Vec<&Value> = trace.iter().map(|step| &step["step"]).collect();
        assert_eq!(json!(steps), json!(["observe", "call", "call", "inject", "call", "inject"]));
        assert_eq!(trace[0]["confusion"], plain["confusion"]);
        let call = |step: usize| (&trace[step]["tool"], &trace[step]["result"], &trace[step]["error"]);
        assert_eq!(call(1), (&json!("oracle"), &Value::Null, &json!("it ended with 2: no such thing")));
        assert_eq!(call(2), (&json!("memory"), &json!("the circle is red"), &Value::Null));
        assert_eq!(
            call(4),
            (&json!("abacus"), &json!(format!("{} red.png", question.split(' ').next().unwrap())), &Value::Null)
        );
        assert_eq!((&trace[5]["knowledge"], &trace[5]["kept"]), (&trace[4]["result"], &json!(false)));
        close(&trace[5]["answers"], 1.0 / (1.0 + 3_f64.exp()));
    }
    let shown = scene.run("agent", &[&asked[..], &questions[..1], &["--max-rounds", "1"]].concat());
    let lines: Vec<&str> = shown.stdout.lines().collect();
    assert_eq!((shown.status, lines.len(), lines[0]), (0, 6, questions[0]), "{lines:?}");
    assert!(lines[1].starts_with("  not sure: ") && lines[3].starts_with("  looks: "), "{lines:?}");
    assert_eq!(lines[4], "  calls oracle (0.506): it ended with 2: no such thing");
    assert_eq!(lines[5], "  confused, and as many tools were called as --max-rounds allows");
    let both = scene.run("agent", &[&asked[..], &questions, &["--max-rounds", "0"]].concat()).stdout;
    assert_eq!(both.matches("\n\n").count(), 3, "{both}");
}

#[test]
fn agent_with_bad_input() {
    let scene = Scene::new();
    fs::write(scene.path("empty.txt"), "\n").expect("a file");
    fs::write(scene.path("tools.json"), r#"{"tools": {"a": {"command": []}}}"#).expect("a file");
    for (arguments, message) in [
        (&[][..], "nothing to ask: give a question"),
        (&["--image", "@nowhere.png"], "there is no such image file"),
        (&["  "], "is empty"),
        (&["x?", "--max-rounds", "-1"], "--max-rounds -1: must be at least 0 and at most 100"),
        (&["x?", "--max-rounds", "101"], "--max-rounds 101: must be at least 0 and at most 100"),
        (&["x?", "--beams", "3"], "beams has no effect with greedy"),
        (&["x?", "--tools", "@nowhere.json"], "nowhere.json: cannot read the tools: "),
        (&["x?", "--tools", "@tools.json"], "tools.json: tools.a.command: expected a program"),
        (&["x?", "--memory", "@empty.txt"], "has no text"),
        (&["x?", "--answers", "@empty.txt"], "has no text"),
        (&["x?", "--trace", "@photos"], "photos: cannot write it: what is there is not a file"),
    ] {
        let refused = scene.run("agent", &[arguments, &["--json"]].concat());
        refused.fails_with(message);
    }
    let second = Scene::with(&TinyModel { phase: 2, ..TinyModel::new() });
    second.run("agent", &["x?"]).fails_with("so it cannot know when to call a tool: phase 3 (train_agent.py) trains");
}

#[test]
fn embed_writes_both_formats() {
    let scene = Scene::new();
    let names = ["photos/below/white.png", "photos/blue.png", "photos/red.png"].map(|name| scene.text(name));
    let texts = ["red", "größer"];
    let arguments = ["--image-dir", "@photos/", "--output", "@new/all.safetensors", "--texts", "red", "größer", "red"];
    let shown = scene.run("embed", &arguments);
    assert!(shown.stdout.starts_with("3 images and 2 texts, 24 numbers each: "), "{}", shown.stdout);
    let found = load_safetensors(scene.path("new/all.safetensors")).expect("a file");
    assert_eq!(found.metadata()["format"], "mamba3-jepa embeddings");
    assert_eq!(serde_json::from_str::<Value>(&found.metadata()["images"]).expect("JSON"), json!(names));
    assert_eq!(found.metadata()["texts"], r#"["red", "größer"]"#);
    let model = scene.model();
    let samples: Vec<Sample<'_>> = names.iter().map(Sample::file).collect();
    assert_eq!(found.to_f32("images").expect("images"), model.embed(&samples).expect("embeddings").concat());
    let expected = model.embed_text(&texts).expect("embeddings").concat();
    assert_eq!(found.to_f32("texts").expect("texts"), expected);

    fs::write(scene.path("texts.txt"), "red\ngrößer\n").expect("a file");
    assert_eq!(scene.run("embed", &["--texts", "@texts.txt", "--output", "@texts.npy"]).status, 0);
    let bytes: Vec<u8> = expected.iter().flat_map(|x| x.to_le_bytes()).collect();
    assert!(fs::read(scene.path("texts.npy")).expect("a file").ends_with(&bytes));
    let list = fs::read_to_string(scene.path("texts.json")).expect("a file");
    assert_eq!(list, "{\n  \"texts\": [\n    \"red\",\n    \"größer\"\n  ]\n}\n");
    let asked = scene.run("embed", &["--images", &names[2], "--question", "Is it red?", "--output", "@one.npy"]);
    assert_eq!(asked.status, 0, "{}", asked.stderr);
    let expected = model.embed(&[samples[2].asking("Is it red?")]).expect("an embedding").concat();
    let bytes: Vec<u8> = expected.iter().flat_map(|x| x.to_le_bytes()).collect();
    assert!(fs::read(scene.path("one.npy")).expect("a file").ends_with(&bytes));
}

#[test]
fn search_ranks_by_cosine() {
    let scene = Scene::new();
    let model = scene.model();
    let names = ["photos/below/white.png", "photos/blue.png", "photos/red.png"].map(|name| scene.text(name));
    let samples: Vec<Sample<'_>> = names.iter().map(Sample::file).collect();
    let query = model.embed_text(&["a red circle"]).expect("an embedding").concat();
    let cosine = |image: &Vec<f32>| image.iter().zip(&query).map(|(a, b)| f64::from(a * b)).sum::<f64>();
    let cosines: Vec<f64> = model.embed(&samples).expect("embeddings").iter().map(cosine).collect();
    let mut order = [0, 1, 2];
    order.sort_by(|&a, &b| cosines[b].total_cmp(&cosines[a]));
    let arguments = ["a red circle", "--image-dir", "@photos", "--top", "2", "--json", "--contact-sheet", "@sheet.png"];
    let found = scene.run("search", &arguments).json();
    assert_eq!((&found["text"], &found["images_searched"]), (&json!("a red circle"), &json!(3)));
    for (result, &place) in found["results"].as_array().expect("a list").iter().zip(&order[..2]) {
        assert_eq!(result["image"], json!(names[place]));
        close(&result["cosine"], cosines[place]);
    }
    assert_eq!(found["results"].as_array().expect("a list").len(), 2);
    assert!(kore_vljepa::image::load_image(scene.path("sheet.png")).expect("a picture").width() > 2 * 288);
    let after_images = scene.run("search", &["--images", &names[0], &names[1], "a red circle"]);
    assert!(after_images.stdout.starts_with("a red circle   (2 images)\n"), "{}", after_images.stderr);
}

#[test]
fn classify_gives_probabilities() {
    let scene = Scene::new();
    fs::write(scene.path("labels.txt"), "red\nblue\ngrün\n").expect("a file");
    let arguments = ["--image-dir", "@photos", "--temperature", "0.2", "--template", "it is {}", "--json", "--labels"];
    let given = scene.run("classify", &[&arguments[..], &["red", "blue ", "grün"]].concat()).json();
    assert_eq!(given, scene.run("classify", &[&arguments[..], &["@labels.txt"]].concat()).json());
    for item in given.as_array().expect("a list") {
        let shares: Vec<f64> = item["labels"]
            .as_array()
            .expect("a list")
            .iter()
            .map(|share| share["probability"].as_f64().expect("a number"))
            .collect();
        assert!((shares.iter().sum::<f64>() - 1.0).abs() < 1e-5 && shares.is_sorted_by(|a, b| a >= b), "{shares:?}");
    }
    let shown = scene.run("classify", &["--image-dir", "@photos", "--labels", "red", "blue", "--top", "1"]).stdout;
    assert!(shown.contains("probability") && shown.contains("blue.png"), "{shown}");
}

#[test]
fn search_and_classify_say_what_confuses() {
    let tiny = TinyModel::new().recursion("hears_answer", true);
    let scene = Scene::with(&tiny);
    let names = ["photos/below/white.png", "photos/blue.png", "photos/red.png"].map(|name| scene.text(name));
    for (command, given, question) in [
        ("search", &["red", "--image-dir", "@photos"][..], None),
        (
            "classify",
            &["--image-dir", "@photos", "--labels", "red", "blue", "--question", "What is it?"],
            Some("What is it?"),
        ),
    ] {
        let ask = |path: &String| {
            let sample = Sample { question, ..Sample::file(path) };
            scene.model().ask(sample).expect("an answer")
        };
        let mut scores = names.each_ref().map(|name| ask(name).confusion.expect("a score"));
        scores.sort_by(f32::total_cmp);
        assert!(scores[1] + 1e-4 < scores[2], "{scores:?}");
        let threshold = f32::midpoint(scores[1], scores[2]);
        let changed = tiny.component_with("recursion", |key, numbers| {
            if key == "recursion.confusion_probe.threshold" {
                numbers[0] = threshold;
            }
        });
        scene.put("recursion", &changed);

        let found = scene.run(command, &[given, &["--json"]].concat()).json();
        let rows = found.get("results").unwrap_or(&found).as_array().expect("a list");
        assert_eq!(rows.len(), 3);
        let shown = scene.run(command, given).stdout;
        for row in rows {
            let name = row["image"].as_str().expect("a text").to_owned();
            let answer = ask(&name);
            close(&row["confusion"], answer.confusion.expect("a score").into());
            assert_eq!((&row["confused"], &row["signal"]), (&json!(answer.confused), &json!(answer.signal)));
            close(found.get("threshold").unwrap_or(&row["threshold"]), threshold.into());
            let line = shown.lines().find(|line| line.contains(&name)).expect("its row");
            assert_eq!(line.contains("  not sure 0."), answer.confused == Some(true), "{line}");
            assert!(line.ends_with(&format!("{:.3}", row["confusion"].as_f64().expect("a number"))), "{line}");
        }
        let line = format!("\n\nconfused about 1 of the 3 shown (confusion over the threshold {threshold:.3})\n");
        assert!(shown.ends_with(&line), "{shown}");
    }

    let early = Scene::with(&TinyModel { phase: 1, ..TinyModel::new() });
    let images = ["--image-dir", "@photos"];
    let found = early.run("search", &[&["red", "--json"], &images[..]].concat()).json();
    let unknown = json!({"confusion": null, "confused": null, "signal": null, "threshold": null});
    let pick = |row: &Value, threshold: &Value| json!({"confusion": row["confusion"], "confused": row["confused"], "signal": row["signal"], "threshold": threshold});
    assert_eq!(found.as_object().expect("an object").len(), 4);
    assert_eq!(found["results"][0].as_object().expect("an object").len(), 5);
    assert_eq!(pick(&found["results"][0], &found["threshold"]), unknown);
    let found = early.run("classify", &[&["--json", "--labels", "a", "b"], &images[..]].concat()).json();
    assert_eq!(found[0].as_object().expect("an object").len(), 6);
    assert_eq!(pick(&found[0], &found[0]["threshold"]), unknown);
    for arguments in [&["search", "red"][..], &["classify", "--labels", "a", "b"]] {
        let shown = early.run(arguments[0], &[&arguments[1..], &images[..]].concat()).stdout;
        assert!(!shown.contains("confus") && !shown.contains("not sure"), "{shown}");
    }
}

#[test]
fn bad_images_are_errors_or_left_out() {
    let scene = Scene::new();
    let whole = fs::read(scene.path("photos/red.png")).expect("a file");
    fs::write(scene.path("broken.png"), &whole[..40]).expect("a file");
    let arguments = ["red", "--json", "--images", "@broken.png"];
    scene.run("search", &[&arguments[..], &["@photos/red.png"]].concat()).fails_with("broken.png");
    let skipped = scene.run("search", &[&arguments[..], &["@photos/red.png", "--on-bad-sample", "skip"]].concat());
    assert_eq!(skipped.status, 0);
    assert!(skipped.stderr.starts_with("WARNING 1 of 2 images left out, the first: "), "{}", skipped.stderr);
    let found: Value = serde_json::from_str(&skipped.stdout).expect("JSON");
    assert_eq!(found["results"][0]["image"], json!(scene.text("photos/red.png")));
    let none = scene.run("search", &[&arguments[..], &["--on_bad_sample=skip"]].concat());
    assert_eq!((none.status, none.stdout.as_str()), (2, ""));
    assert!(none.stderr.starts_with("WARNING 1 of 1 images left out, the first: "), "{}", none.stderr);
    assert!(none.stderr.ends_with("\nerror: none of the images can be read\n"), "{}", none.stderr);
}

#[test]
fn bad_input_to_the_commands_about_images() {
    let scene = Scene::new();
    fs::create_dir(scene.path("empty")).expect("a folder");
    fs::create_dir(scene.path("taken.json")).expect("a folder");
    fs::write(scene.path("labels.txt"), "").expect("a file");
    let before = fs::read_dir(scene.folder.path()).expect("a folder").count();
    let images = ["--image-dir", "@photos"];
    let output = ["--output", "@x.npy"];
    for (command, arguments, message) in [
        ("embed", &[&output[..]].concat(), "nothing to embed"),
        ("embed", &["--texts", "red", "--output", "x.pt"].to_vec(), "must end in .npy or .safetensors"),
        ("embed", &[&images[..], &["--texts", "red"], &output].concat(), "one array holds images or texts"),
        ("embed", &[&["--texts", "red", "--question", "x?"], &output[..]].concat(), "there are none"),
        ("embed", &[&["--texts", " "], &output[..]].concat(), "is empty"),
        ("embed", &[&images[..], &["--question", ""], &output].concat(), "is empty"),
        ("embed", &[&images[..], &["--batch-size", "0"], &output].concat(), "--batch-size 0: must be at least 1"),
        ("embed", &[&images[..], &["--batch-size", "65537"], &output].concat(), "at least 1 and at most 65536"),
        ("embed", &["--texts", "red", "--output", "/proc/nowhere/x.npy"].to_vec(), "cannot write"),
        ("embed", &["--texts", "red", "--output", "/proc/nowhere/x.safetensors"].to_vec(), "cannot write"),
        ("embed", &["--texts", "red", "--output", "@taken.npy"].to_vec(), "is a folder where the names are to go"),
        ("search", &["red"].to_vec(), "no images: give --images or --image-dir"),
        ("search", &images.to_vec(), "nothing to search for"),
        ("search", &["red", "--image-dir", "@empty"].to_vec(), "no image in it"),
        ("search", &["red", "--image-dir", "@no"].to_vec(), "there is no such folder"),
        ("search", &[&[" "], &images[..]].concat(), "is empty"),
        ("search", &[&["red", "--top", "-3"], &images[..]].concat(), "--top -3: must be at least 1"),
        ("search", &[&["red", "--device", "toaster"], &images[..]].concat(), "--device toaster: not available here"),
        ("search", &[&["red", "--contact-sheet", "/proc/nowhere/x.png"], &images[..]].concat(), "cannot write"),
        ("classify", &[&images[..], &["--labels", "red"]].concat(), "at least two different labels"),
        ("classify", &[&images[..], &["--labels", "red", "red "]].concat(), "at least two different labels"),
        ("classify", &[&images[..], &["--labels", "@labels.txt"]].concat(), "has no text"),
        ("classify", &[&images[..], &["--labels", "a", "b", "--template", "it"]].concat(), "must contain {} once"),
        ("classify", &[&images[..], &["--labels", "a", "b", "--temperature", "0"]].concat(), "greater than 0"),
        (
            "classify",
            &[&images[..], &["--labels", "a", "b", "--temperature", "1e-50"]].concat(),
            "--temperature 1e-50: ",
        ),
        (
            "classify",
            &[&images[..], &["--labels", "a", "b", "--temperature", "1e39"]].concat(),
            "--temperature 1e+39: ",
        ),
        ("classify", &[&images[..], &["--labels", "a", "b", "--temperature", "nan"]].concat(), "--temperature nan: "),
    ] {
        scene.run(command, arguments).fails_with(message);
    }
    assert_eq!(fs::read_dir(scene.folder.path()).expect("a folder").count(), before);
}

#[test]
fn verify_needs_golden_files() {
    let scene = Scene::new();
    run(&["verify", &scene.text("weights")]).fails_with("golden");
}

#[test]
fn bench_measures_every_part() {
    let scene = Scene::new();
    let settings = ["--rounds", "2", "--early", "4", "--late", "9", "--window", "3", "--lengths", "5", "17", "--json"];
    let found = scene.run("bench", &settings).json();
    for key in [
        "open_seconds",
        "read_seconds",
        "x_encoder_seconds",
        "predictor_seconds",
        "token_seconds_early",
        "token_seconds_late",
        "ask_seconds",
    ] {
        assert!(found[key].as_f64().expect(key) > 0.0, "{key}");
    }
    assert_eq!(
        (&found["visual_tokens"], &found["question_tokens"], &found["threads"]),
        (&json!(16), &json!(16), &json!(1))
    );
    assert_eq!(found["prefill"].as_array().expect("a list").len(), 2);
    let bytes: u64 =
        TinyModel::new().components().iter().map(|name| TinyModel::new().component(name).len() as u64).sum();
    assert_eq!(found["weights_bytes"], json!(bytes));
    scene.run("bench", &["--early", "3", "--window", "32"]).fails_with("starts before the text");
    for (flag, most) in [
        ("--late", 1 << 20),
        ("--early", 1 << 20),
        ("--window", 1 << 20),
        ("--rounds", 10_000),
        ("--lengths", 1 << 16),
        ("--visual-tokens", 1 << 16),
        ("--question-tokens", 1 << 16),
    ] {
        let given = (most + 1).to_string();
        scene
            .run("bench", &[flag, &given])
            .fails_with(&format!("{flag} {given}: must be at least 1 and at most {most}"));
    }
    scene.run("bench", &["--late", "20"]).fails_with("must come after");
    let without = Scene::with(&TinyModel { phase: 1, ..TinyModel::new() });
    let shown = without.run("bench", &["--rounds", "1", "--lengths", "3"]);
    assert!(shown.stdout.contains("not exported"), "{} {}", shown.stdout, shown.stderr);
}

#[test]
fn weights_that_are_not_finite_are_an_error_of_every_command() {
    for (phase, component) in [(1, "predictor"), (1, "y_encoder"), (1, "x_encoder"), (2, "y_decoder"), (3, "recursion")]
    {
        let model = TinyModel { phase, ..TinyModel::new() };
        let scene = Scene::with(&model);
        let bytes = model.component_with(component, |key, numbers| {
            if key.ends_with(".bias") {
                numbers.fill(f32::NAN);
            }
        });
        scene.put(component, &bytes);
        let embeds = !["y_decoder", "recursion"].contains(&component);
        let images = ["--image-dir", "@photos"];
        let runs: [(&str, &[&str], bool); 6] = [
            ("ask", &["--image", "@photos/red.png", "--json", "what?"], true),
            ("ask", &["what?"], component != "x_encoder"),
            ("embed", &[&images[..], &["--output", "@out.npy"]].concat(), embeds && component != "y_encoder"),
            ("embed", &["--texts", "red", "--output", "@out.npy"], component == "y_encoder"),
            ("search", &[&images[..], &["--json", "red"]].concat(), component != "y_decoder"),
            ("classify", &[&images[..], &["--json", "--labels", "a", "b"]].concat(), component != "y_decoder"),
        ];
        for (command, arguments, fails) in runs {
            let result = scene.run(command, arguments);
            if fails {
                result.fails_with("not finite");
            } else {
                assert_eq!(result.status, 0, "{component}, {command}: {}", result.stderr);
            }
        }
        if phase == 3 {
            scene.run("agent", &["what?"]).fails_with("not finite");
        }
    }
}

#[test]
fn what_is_left_aside_is_said() {
    let scene = Scene::new();
    for name in ["a.tif", "below/b.TIF", "c.tar.gz", ".d.tif", "e.json"] {
        fs::write(scene.path("photos").join(name), "").expect("a file");
    }
    let found = scene.run("search", &["red", "--image-dir", "@photos"]);
    let expected = format!(
        "WARNING {}: not read: 2 .tif (no decoder for them: convert them to JPEG or PNG); 1 .tar.gz (samples are read by \
         position, which compression hides: unpack them to .tar)\n",
        scene.text("photos")
    );
    assert_eq!((found.status, found.stderr), (0, expected));
    fs::create_dir(scene.path("scans")).expect("a folder");
    fs::write(scene.path("scans/a.heic"), "").expect("a file");
    let scans = scene.run("search", &["red", "--image-dir", "@scans"]);
    scans.fails_with(", .bmp), but 1 .heic (no decoder for them: convert them to JPEG or PNG)");

    let path = scene.path("weights/config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).expect("a file")).expect("JSON");
    config["notes"] = json!("mine");
    fs::write(&path, config.to_string()).expect("a file");
    let asked = scene.run("ask", &["red?"]);
    assert_eq!(asked.status, 0);
    assert!(asked.stderr.ends_with("config.json: not known to this version, and ignored: notes\n"), "{}", asked.stderr);
    assert_eq!(asked.stderr.lines().count(), 1);
}

#[test]
fn instructions_that_do_not_exist_are_refused() {
    let scene = Scene::new();
    let run = |name: &str| {
        let arguments = ["ask", "--weights", &scene.text("weights"), "red?"];
        command(&arguments).env("KORE_VLJEPA_SIMD", name).output().expect("the command starts")
    };
    for name in ["", "plain"] {
        assert!(run(name).status.success(), "{name:?}");
    }
    let refused = run("bogus");
    assert_eq!(refused.status.code(), Some(2));
    let said = String::from_utf8(refused.stderr).expect("UTF-8");
    assert!(said.starts_with("error: KORE_VLJEPA_SIMD=bogus: this processor has plain"), "{said}");
}
