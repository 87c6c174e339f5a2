mod answers;
mod confusion;
mod damage;
mod turns;

use std::path::Path;

use tempfile::TempDir;

use super::*;
use crate::image::Picture;
use crate::testing::TinyModel;

/// An exported folder, gone when this is.
fn exported(model: &TinyModel) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    model.write(folder.path());
    folder
}

fn opened(model: &TinyModel) -> Mamba3Jepa {
    Mamba3Jepa::options().threads(2).open(exported(model).path()).unwrap()
}

/// A picture of another shape than the model's.
fn picture(seed: usize) -> Picture {
    let (width, height) = (40 + seed, 33);
    let rgb = (0..width * height * 3).map(|i| u8::try_from((i * (7 + seed) + i / 97) % 251).unwrap()).collect();
    Picture::new(width, height, rgb).unwrap()
}

fn assert_near(found: &[f32], expected: &[f32], what: &str) {
    let length = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x * x)).sum::<f64>().sqrt();
    let difference = length(&mut found.iter().zip(expected).map(|(a, b)| a - b));
    let error = difference / length(&mut expected.iter().copied());
    assert!(found.len() == expected.len() && error < 1e-5, "{what}: {error:e}");
}

fn is_unit(embedding: &[f32]) -> bool {
    (embedding.iter().map(|x| x * x).sum::<f32>() - 1.0).abs() < 1e-5
}

#[test]
fn every_variant_answers() {
    for (name, tiny) in TinyModel::variants() {
        let model = opened(&tiny);
        let (a, b) = (picture(0), picture(5));
        let samples = [Sample::picture(&a).asking("What color is it?"), Sample::question("Why?"), Sample::picture(&b)];
        let observed = model.observe(&samples).unwrap();
        assert_eq!(observed.len(), 3);
        for (sample, together) in samples.iter().zip(&observed) {
            assert!(is_unit(&together.embedding), "{name}");
            let alone = model.observe(&[*sample]).unwrap().remove(0);
            assert_near(&together.embedding, &alone.embedding, name);
            assert_near(&together.pooled, &alone.pooled, name);
        }
        assert!(model.embed_text(&["red", "größer"]).unwrap().iter().all(|embedding| is_unit(embedding)));
        let answer = model.ask(samples[0]).unwrap();
        assert!((0.0..=1.0).contains(&answer.confidence), "{name}: {answer:?}");
        assert_eq!(answer.nearest.len(), 3, "{name}");
    }
}

#[test]
fn threads_change_nothing() {
    let folder = exported(&TinyModel::new());
    let (picture, one) = (picture(1), Mamba3Jepa::options().threads(1).open(folder.path()).unwrap());
    let samples = [Sample::picture(&picture).asking("How many?"), Sample::question("What?")];
    let expected = one.observe(&samples).unwrap();
    for threads in [2, 3, 5] {
        let model = Mamba3Jepa::options().threads(threads).open(folder.path()).unwrap();
        assert_eq!(model.observe(&samples).unwrap(), expected, "{threads} threads");
        assert_eq!(model.embed_text(&["a b c"]).unwrap(), one.embed_text(&["a b c"]).unwrap());
    }
}

#[test]
fn passes_hold_32_samples() {
    let model = opened(&TinyModel::new());
    let samples = [Sample::question("Why?"); 70];
    let mut calls = Vec::new();
    model.observe_with(&samples, &mut |done, total| calls.push((done, total))).unwrap();
    assert_eq!(calls, [(32, 70), (64, 70), (70, 70)]);
    // The moving average of equal passes is the activity of one.
    let activity = model.gate_activity().unwrap();
    for (average, last) in activity.activity_ema().iter().zip(activity.activity()) {
        assert!((average - last).abs() < 1e-5 && *average > 0.0);
    }
    model.reset_context();
    assert!(model.gate_activity().unwrap().activity_ema().is_empty());
    assert!(opened(&TinyModel::new().set("/angn/enabled", false)).gate_activity().is_none());
}

#[test]
fn many_threads_may_ask_at_once() {
    let model = opened(&TinyModel::new());
    let sample = Sample::question("Why?");
    let expected = model.embed(&[sample]).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..8).for_each(|_| assert_eq!(model.embed(&[sample; 3]).unwrap()[0], expected[0])));
        }
    });
}

#[test]
fn a_file_and_its_picture_are_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("picture.png");
    let picture = picture(3);
    let (width, height) = (u32::try_from(picture.width()).unwrap(), u32::try_from(picture.height()).unwrap());
    let mut encoder = png::Encoder::new(std::fs::File::create(&path).unwrap(), width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.write_header().unwrap().write_image_data(picture.rgb()).unwrap();
    let model = opened(&TinyModel::new());
    let seen = model.embed(&[Sample::picture(&picture), Sample::file(&path), Sample::file(&path)]).unwrap();
    assert_eq!(seen[0], seen[1]);
    assert_eq!(seen[0], seen[2]);
    let named = model.embed_images(&[&path], None, OnBadImage::Stop, &mut |_, _| {}).unwrap();
    assert_near(&named.embeddings, &seen[0], "embed_images");
    let missing = folder.path().join("none.png");
    let error = model.embed_images(&[&path, &missing], None, OnBadImage::Stop, &mut |_, _| {}).unwrap_err();
    assert!(error.to_string().contains("none.png"), "{error}");
    let rest = model.embed_images(&[&path, &missing], None, OnBadImage::Skip, &mut |_, _| {}).unwrap();
    assert_eq!(rest.paths, std::slice::from_ref(&path));
    let none = model.embed_images(&[&missing], None, OnBadImage::Skip, &mut |_, _| {}).unwrap_err();
    assert_eq!(none.to_string(), "none of the images can be read");
}

#[test]
fn search_and_classify_rank() {
    let model = opened(&TinyModel::new());
    let texts = ["a red circle", "two blue squares", "nothing"];
    let images = ImageEmbeddings {
        paths: texts.map(Into::into).into(),
        embeddings: model.embed_text(&texts).unwrap().concat(),
        pooled: vec![0.5; 3 * 32],
    };
    let found = model.search("two blue squares", &images, 2).unwrap();
    assert_eq!((found.len(), found[0].path), (2, Path::new("two blue squares")));
    assert!((found[0].cosine - 1.0).abs() < 1e-5 && found[1].cosine < found[0].cosine);
    let classified = model.classify(&images, &["nothing", " red circle", "red circle"], "a {}", 0.07).unwrap();
    assert_eq!(classified[0].labels[0].0, "red circle");
    for (Classified { path, labels, .. }, text) in classified.iter().zip(texts) {
        assert_eq!((*path, labels.len()), (Path::new(text), 2));
        assert!((labels[0].1 + labels[1].1 - 1.0).abs() < 1e-5 && labels[0].1 >= labels[1].1);
    }
    for (labels, temperature) in [(vec!["a"], 0.07), (vec!["a", " "], 0.07), (vec!["a", "b"], 0.0)] {
        assert!(matches!(model.classify(&images, &labels, "{}", temperature), Err(Error::Input(_))));
    }
    assert!(matches!(model.search("", &images, 2), Err(Error::Input(_))));
    let short = ImageEmbeddings { pooled: vec![0.5; 3 * 32 - 1], ..images.clone() };
    let damaged = ImageEmbeddings { pooled: vec![f32::NAN; 3 * 32], ..images };
    for wrong in [ImageEmbeddings::default(), short, damaged] {
        assert!(matches!(model.search("a", &wrong, 2), Err(Error::Input(_))));
        assert!(matches!(model.classify(&wrong, &["a", "b"], "{}", 0.07), Err(Error::Input(_))));
    }
}

#[test]
fn bad_input_is_an_error() {
    let model = opened(&TinyModel::new());
    assert!(matches!(model.observe(&[]), Err(Error::Input(_))));
    assert!(matches!(model.observe(&[Sample::question(" \u{1c}")]), Err(Error::Input(_))));
    assert!(matches!(model.embed_text(&["a", "\n"]), Err(Error::Input(_))));
    assert!(matches!(model.embed_text(&[""; 0]), Err(Error::Input(_))));
    let short = GenerationConfig::default();
    assert!(matches!(model.generate(&[&[1.0]], &short), Err(Error::Input(_))));
    let error = model.observe(&[Sample::file(Path::new("/nowhere.png"))]).unwrap_err();
    assert!(error.to_string().starts_with("/nowhere.png: "), "{error}");
}

#[test]
fn without_x_encoder_only_questions_are_answered() {
    let tiny = TinyModel::new();
    let folder = exported(&tiny);
    let other = tempfile::tempdir().unwrap();
    let moved = other.path().join("x_encoder.safetensors");
    damage::unlist(folder.path(), "x_encoder");
    std::fs::rename(folder.path().join("x_encoder.safetensors"), &moved).unwrap();
    let model = Mamba3Jepa::from_dir(folder.path()).unwrap();
    assert!(!model.has_x_encoder());
    let picture = picture(0);
    assert!(is_unit(&model.embed(&[Sample::question("Why?")]).unwrap()[0]));
    let error = model.ask(Sample::picture(&picture)).unwrap_err();
    assert!(matches!(error, Error::Absent(_)) && error.to_string().contains("--x-encoder"), "{error}");
    let given = Mamba3Jepa::options().x_encoder(&moved).open(folder.path()).unwrap();
    assert_eq!(
        given.embed(&[Sample::picture(&picture)]).unwrap(),
        opened(&tiny).embed(&[Sample::picture(&picture)]).unwrap()
    );
    std::fs::write(&moved, TinyModel::new().set("/vision/depth", 1).component("x_encoder")).unwrap();
    let error = Mamba3Jepa::options().x_encoder(&moved).open(folder.path()).err().unwrap().to_string();
    assert!(error.contains("this X-Encoder is ") && error.contains("depth: 1"), "{error}");
}

#[test]
fn says_what_the_user_should_know() {
    let folder = exported(&TinyModel::new().set("/angn/context_reset_threshold", 0.99));
    let said = std::sync::Arc::new(Mutex::new(Vec::new()));
    let heard = said.clone();
    let options = Mamba3Jepa::options().on_warning(move |text| heard.lock().unwrap().push(text.to_owned()));
    let model = options.open(folder.path()).unwrap();
    let long = "word ".repeat(20);
    model.observe(&[Sample::question(&long), Sample::question("short")]).unwrap();
    model.observe(&[Sample::question("short")]).unwrap();
    let said = said.lock().unwrap();
    assert_eq!(said[0], "1 of 2 questions are longer than 32 tokens and were cut");
    assert!(said[1].contains("reset the context"));
    assert_eq!(said.len(), 2, "the second pass is still under the threshold, and says nothing new: {said:?}");
}
