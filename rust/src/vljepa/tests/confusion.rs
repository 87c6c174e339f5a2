use std::path::PathBuf;

use super::*;

/// Files with three pictures, gone with the folder.
fn pictures() -> (TempDir, Vec<PathBuf>) {
    let folder = tempfile::tempdir().unwrap();
    let files = (0..3).map(|seed| {
        let (path, picture) = (folder.path().join(format!("{seed}.png")), picture(seed * 50));
        let (width, height) = (u32::try_from(picture.width()).unwrap(), u32::try_from(picture.height()).unwrap());
        let mut encoder = png::Encoder::new(std::fs::File::create(&path).unwrap(), width, height);
        encoder.set_color(png::ColorType::Rgb);
        encoder.write_header().unwrap().write_image_data(picture.rgb()).unwrap();
        path
    });
    let files = files.collect();
    (folder, files)
}

/// The model with another threshold of confusion.
pub(super) fn with_threshold(tiny: &TinyModel, threshold: f32) -> Mamba3Jepa {
    let folder = exported(tiny);
    let recursion = tiny.component_with("recursion", |key, numbers| {
        if key == "recursion.confusion_probe.threshold" {
            numbers[0] = threshold;
        }
    });
    damage::replace(folder.path(), "recursion", &recursion);
    Mamba3Jepa::options().threads(2).batch_size(2).open(folder.path()).unwrap()
}

fn assert_judged_alike(found: Option<Confusion>, answer: &Answer) {
    let found = found.unwrap();
    assert!((found.score - answer.confusion.unwrap()).abs() < 1e-5, "{found:?}: {answer:?}");
    assert_eq!((Some(found.threshold), Some(found.is_confused())), (answer.threshold, answer.confused));
    assert_eq!(found.signal(), answer.signal);
}

#[test]
fn search_and_classify_are_confused_by_what_an_answer_is() {
    let (_folder, files) = pictures();
    for hears_answer in [true, false] {
        let tiny = TinyModel::new().recursion("hears_answer", hears_answer);
        for question in [None, Some("What color is it?")] {
            let sample = |path| Sample { question, ..Sample::file(path) };
            let model = with_threshold(&tiny, 0.5);
            let mut scores: Vec<f32> =
                files.iter().map(|path| model.ask(sample(path)).unwrap().confusion.unwrap()).collect();
            scores.sort_by(f32::total_cmp);
            assert!(scores[0] + 1e-4 < scores[1], "{scores:?}");

            let model = with_threshold(&tiny, f32::midpoint(scores[0], scores[1]));
            let answers: Vec<Answer> = files.iter().map(|path| model.ask(sample(path)).unwrap()).collect();
            assert_eq!(answers.iter().filter(|answer| answer.confused == Some(true)).count(), 2);
            let images = model.embed_images(&files, question, OnBadImage::Stop, &mut |_, _| {}).unwrap();
            let classified = model.classify(&images, &["red", "blue"], "{}", 0.07).unwrap();
            for (image, answer) in classified.iter().zip(&answers) {
                assert_judged_alike(image.confusion, answer);
            }
            let found = model.search("red", &images, 2).unwrap();
            assert_eq!(found.len(), 2);
            for found in found {
                let place = files.iter().position(|path| path == found.path).unwrap();
                assert_judged_alike(found.confusion, &answers[place]);
            }
        }
    }
}

#[test]
fn without_recursion_nothing_is_known_of_confusion() {
    let (_folder, files) = pictures();
    let model = opened(&TinyModel { phase: 2, ..TinyModel::new() });
    let images = model.embed_images(&files, None, OnBadImage::Stop, &mut |_, _| {}).unwrap();
    assert!(model.search("red", &images, 3).unwrap().iter().all(|found| found.confusion.is_none()));
    let classified = model.classify(&images, &["red", "blue"], "{}", 0.07).unwrap();
    assert!(classified.iter().all(|image| image.confusion.is_none()));
}

#[test]
fn a_score_at_the_threshold_is_not_over_it() {
    let at = Confusion { score: 0.5, threshold: 0.5, cause: Signal::Answer };
    assert_eq!((at.is_confused(), at.signal()), (false, None));
    let over = Confusion { score: 0.500_001, ..at };
    assert_eq!((over.is_confused(), over.signal()), (true, Some(Signal::Answer)));
}
