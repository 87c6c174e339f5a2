use super::confusion::with_threshold;
use super::turns::plain;
use super::*;
use crate::generate::Method;
use crate::memory::KnowledgeMemory;

/// A model that is confused by everything, or by nothing.
fn model(is_confused: bool, floor: f32) -> Mamba3Jepa {
    model_of(&TinyModel::new(), is_confused, floor)
}

pub(super) fn model_of(tiny: &TinyModel, is_confused: bool, floor: f32) -> Mamba3Jepa {
    let folder = exported(tiny);
    let recursion = tiny.component_with("recursion", |key, numbers| match key {
        "recursion.confusion_probe.threshold" => numbers[0] = if is_confused { 0.0 } else { 1.0 },
        "recursion.memory_floor" => numbers[0] = floor,
        _ => {}
    });
    damage::replace(folder.path(), "recursion", &recursion);
    Mamba3Jepa::options().threads(2).open(folder.path()).unwrap()
}

pub(super) fn many<'m>(
    answerer: &mut Answerer<'m>,
    samples: &[Sample<'_>],
    knowledge: Option<Knowledge<'_>>,
) -> Vec<Answer> {
    answerer.ask_many(samples, knowledge, &mut |_, _| {}).unwrap()
}

pub(super) const QUESTIONS: [Sample<'static>; 3] = [
    Sample { image: None, question: Some("What color is it?") },
    Sample { image: None, question: Some("How many are there?") },
    Sample { image: None, question: None },
];

#[test]
fn an_answer_is_made_of_the_parts() {
    let model = model(false, -1.0);
    let observed = model.observe(&QUESTIONS).unwrap();
    let embeddings: Vec<&[f32]> = observed.iter().map(|o| &o.embedding[..]).collect();
    let spoken = model.generate(&embeddings, &GenerationConfig::default()).unwrap();
    let known = model.embed_text(model.known_answers()).unwrap();
    let mut answerer = model.answerer(AnswererOptions { top: 2, ..Default::default() }).unwrap();
    for ((answer, observation), spoken) in many(&mut answerer, &QUESTIONS, None).iter().zip(&observed).zip(spoken) {
        assert_eq!(answer.text, crate::texts::strip(&model.tokenizer().decode(&spoken.ids).unwrap()));
        assert_eq!(answer.confidence, spoken.confidence());
        let probe = &model.recursion().unwrap().confusion_probe;
        assert_eq!(answer.confusion, Some(probe.score(&observation.pooled, None).unwrap()));
        assert_eq!((answer.confused, answer.nearest.len()), (Some(false), 2));
        assert_eq!((answer.threshold, answer.sure, answer.signal), (Some(1.0), Some(true), None));
        let (text, cosine) = &answer.nearest[0];
        let place = model.known_answers().iter().position(|known| known == text).unwrap();
        let dot: f32 = known[place].iter().zip(&observation.embedding).map(|(a, b)| a * b).sum();
        assert!((dot - cosine).abs() < 1e-5 && answer.nearest[1].1 <= *cosine);
    }
}

#[test]
fn confusion_is_smoothed_over_the_turns_with_a_question() {
    let model = model(false, -1.0);
    let mut answerer = model.answerer(AnswererOptions { smooth: true, ..Default::default() }).unwrap();
    // The first question comes again, about a picture, with the others between.
    let picture = picture(1);
    let samples = [&QUESTIONS[..], &[Sample { question: QUESTIONS[0].question, ..Sample::picture(&picture) }]].concat();
    let together = many(&mut answerer, &samples, None);
    for answer in &together[..QUESTIONS.len()] {
        assert_eq!(answer.smoothed_confusion, answer.confusion);
    }
    let (first, last) = (together[0].confusion.unwrap(), &together[QUESTIONS.len()]);
    assert_ne!(last.confusion, Some(first));
    let average = 0.9 * first + (1.0 - 0.9) * last.confusion.unwrap();
    assert!((last.smoothed_confusion.unwrap() - average).abs() < 1e-6);
    let next = answerer.ask(QUESTIONS[0]).unwrap();
    assert!((next.smoothed_confusion.unwrap() - (0.9 * average + (1.0 - 0.9) * first)).abs() < 1e-6);
    answerer.reset();
    let one_by_one: Vec<Answer> = samples.iter().map(|&sample| answerer.ask(sample).unwrap()).collect();
    for (a, b) in one_by_one.iter().zip(&together) {
        assert_eq!(a.text, b.text);
        assert!((a.smoothed_confusion.unwrap() - b.smoothed_confusion.unwrap()).abs() < 1e-5);
    }
}

#[test]
fn what_was_confusing_before_is_the_signal_of_a_clear_turn() {
    let (tiny, picture) = (TinyModel::new(), picture(1));
    let turns = [QUESTIONS[0], Sample { question: QUESTIONS[0].question, ..Sample::picture(&picture) }];
    let scores: Vec<f32> =
        many(&mut plain(&model(false, -1.0)), &turns, None).iter().map(|answer| answer.confusion.unwrap()).collect();
    let by_score = if scores[0] > scores[1] { [turns[0], turns[1]] } else { [turns[1], turns[0]] };
    let model = with_threshold(&tiny, f32::midpoint(scores[0], scores[1]));
    for smooth in [true, false] {
        let mut answerer = model.answerer(AnswererOptions { smooth, ..Default::default() }).unwrap();
        let answers = many(&mut answerer, &by_score, None);
        assert_eq!((answers[0].confused, answers[0].signal), (Some(true), Some(Signal::State)));
        let expected = if smooth { (Some(true), Some(Signal::Before)) } else { (Some(false), None) };
        assert_eq!((answers[1].confused, answers[1].signal), expected);
    }
}

#[test]
fn sampled_answers_do_not_depend_on_the_batch() {
    let model = model(false, -1.0);
    let generation = GenerationConfig { method: Method::Sample, temperature: 1.5, ..Default::default() };
    let options = AnswererOptions { generation, ..Default::default() };
    let together = many(&mut model.answerer(options.clone()).unwrap(), &[QUESTIONS[0]; 40], None);
    let mut answerer = model.answerer(options).unwrap();
    for answer in &together[..3] {
        assert_eq!(answerer.ask(QUESTIONS[0]).unwrap().text, answer.text);
    }
    assert!(together.iter().any(|answer| answer.text != together[0].text));
}

#[test]
fn a_confused_model_looks_in_its_memory() {
    let confused = model(true, -1.0);
    let facts = ["The sky is green.", "Three circles.", "Ask again."];
    let memory = KnowledgeMemory::build(&confused, &facts, &mut |_, _| {}).unwrap();
    let ask = |model: &Mamba3Jepa| {
        let options = AnswererOptions { memory: Some(memory.clone()), ..Default::default() };
        many(&mut model.answerer(options).unwrap(), &QUESTIONS, None)
    };
    let plain = many(&mut confused.answerer(AnswererOptions::default()).unwrap(), &QUESTIONS, None);
    let observed = confused.observe(&QUESTIONS).unwrap();
    for ((answer, plain), observation) in ask(&confused).iter().zip(&plain).zip(&observed) {
        let (text, _) = memory.search(&observation.embedding, 1).unwrap()[0];
        assert_eq!(answer.memory_used.as_deref(), Some(text));
        assert_eq!((answer.sure, answer.signal, answer.knowledge_used), (Some(true), Some(Signal::State), false));
        assert_eq!((plain.sure, plain.signal), (Some(false), Some(Signal::State)));
        assert_ne!(answer.nearest, plain.nearest, "the answer is read from another embedding");
        // The same as knowledge given by hand.
        let options = AnswererOptions::default();
        let told = many(&mut confused.answerer(options).unwrap(), &QUESTIONS, Some(Knowledge::Text(text)));
        assert!(told.iter().any(|told| told.text == answer.text && told.nearest == answer.nearest));
    }
    assert!(ask(&model(false, -1.0)).iter().all(|answer| answer.memory_used.is_none()));
    assert_eq!(ask(&model(true, 1.1)), plain, "nothing in the memory is near enough");
}

#[test]
fn a_retriever_looks_in_the_memory_with_the_question() {
    let tiny = TinyModel::new().recursion("retriever_dim", 9).recursion("injector_sees_state", true);
    let confused = model_of(&tiny, true, -1.0);
    let facts = ["The sky is green.", "Three circles.", "Ask again.", "red"];
    let memory = KnowledgeMemory::build(&confused, &facts, &mut |_, _| {}).unwrap();
    let ask = |model: &Mamba3Jepa| {
        let options = AnswererOptions { memory: Some(memory.clone()), ..Default::default() };
        many(&mut model.answerer(options).unwrap(), &QUESTIONS, None)
    };
    let retriever = confused.recursion().unwrap().retriever.as_ref().unwrap();
    let keys: Vec<Vec<f32>> =
        confused.embed_text(&facts).unwrap().iter().map(|text| retriever.text.apply(text).unwrap()).collect();
    let answers = ask(&confused);
    for (answer, sample) in answers.iter().zip(&QUESTIONS[..2]) {
        let asked = confused.embed_text(&[sample.question.unwrap()]).unwrap().concat();
        let query = retriever.question.apply(&asked).unwrap();
        let cosine = |key: &[f32]| key.iter().zip(&query).map(|(a, b)| a * b).sum::<f32>();
        let best = (0..4).max_by(|&a, &b| cosine(&keys[a]).total_cmp(&cosine(&keys[b]))).unwrap();
        assert_eq!((answer.memory_used.as_deref(), answer.sure), (Some(facts[best]), Some(true)));
        let mut told = confused.answerer(AnswererOptions::default()).unwrap();
        let told = many(&mut told, &[*sample], Some(Knowledge::Text(facts[best]))).remove(0);
        assert_eq!((&told.text, told.knowledge_used), (&answer.text, true));
        for ((a, near), (b, nearly)) in told.nearest.iter().zip(&answer.nearest) {
            assert!(a == b && (near - nearly).abs() < 1e-5);
        }
    }
    let plain = many(&mut confused.answerer(AnswererOptions::default()).unwrap(), &QUESTIONS, None);
    assert_eq!(answers[2], plain[2], "nothing is looked up without a question");
    assert_eq!(ask(&model_of(&tiny, true, 1.1)), plain, "nothing in the memory is near enough");
    assert!(ask(&model_of(&tiny, false, -1.0)).iter().all(|answer| answer.memory_used.is_none()));
    let other = opened(&tiny.set("/embed_dim", 16));
    assert!(matches!(
        other.answerer(AnswererOptions { memory: Some(memory), ..Default::default() }).err(),
        Some(Error::Input(_))
    ));
}

#[test]
fn knowledge_is_injected_where_it_is_needed_or_always() {
    let ask = |is_confused: bool, inject: Inject, knowledge: Option<Knowledge<'_>>| {
        let options = AnswererOptions { inject, ..Default::default() };
        many(&mut model(is_confused, -1.0).answerer(options).unwrap(), &QUESTIONS, knowledge)
    };
    let vector = model(true, -1.0).embed_text(&["red"]).unwrap().remove(0);
    for knowledge in [Knowledge::Text("red"), Knowledge::Vector(&vector)] {
        let confused = ask(true, Inject::Confused, Some(knowledge));
        assert_eq!(confused, ask(true, Inject::Always, Some(knowledge)));
        assert!(confused.iter().all(|a| (a.knowledge_used, a.confused, a.sure) == (true, Some(true), Some(true))));
        let calm = ask(false, Inject::Confused, Some(knowledge));
        assert_eq!(calm, ask(false, Inject::Confused, None));
        assert!(calm.iter().all(|a| (a.knowledge_used, a.confused, a.sure) == (false, Some(false), Some(true))));
        for (always, confused) in ask(false, Inject::Always, Some(knowledge)).iter().zip(&confused) {
            assert_eq!((&always.nearest, always.knowledge_used), (&confused.nearest, true));
        }
    }
    assert!(ask(true, Inject::Always, None).iter().all(|a| !a.knowledge_used && a.sure == Some(false)));
}

#[test]
fn the_signal_is_judged_with_a_sure_answer() {
    let tiny = TinyModel::new().recursion("hears_answer", true);
    for phase in [2, 3] {
        let tiny = TinyModel { phase, ..tiny.clone() };
        let model = opened(&tiny);
        let answers = many(&mut model.answerer(AnswererOptions::default()).unwrap(), &QUESTIONS, None);
        for (answer, observation) in answers.iter().zip(model.observe(&QUESTIONS).unwrap()) {
            let probe = model.recursion().map(|recursion| &recursion.confusion_probe);
            let signal =
                probe.filter(|_| answer.confused == Some(true)).map(|p| p.signal(&observation.pooled).unwrap());
            assert_eq!((answer.signal, answer.threshold.is_some()), (signal, phase == 3));
            assert_eq!(answer.sure, answer.confused.map(|confused| !confused));
        }
    }
}

#[test]
fn knowledge_must_fit_the_model() {
    let plain = model(true, -1.0);
    let mut answerer = plain.answerer(AnswererOptions::default()).unwrap();
    let text = many(&mut answerer, &QUESTIONS[..1], Some(Knowledge::Text("red")));
    let vector = plain.embed_text(&["red"]).unwrap().remove(0);
    answerer.reset();
    assert_eq!(text, many(&mut answerer, &QUESTIONS[..1], Some(Knowledge::Vector(&vector))));
    let mut error = |knowledge| answerer.ask_many(&QUESTIONS, Some(knowledge), &mut |_, _| {}).unwrap_err().to_string();
    assert!(error(Knowledge::Vector(&[1.0])).contains("length 1, but this model takes length 24"));
    assert!(error(Knowledge::Vector(&[f32::NAN; 24])).contains("not finite"));
    assert!(error(Knowledge::Text(" ")).contains("text 0 is empty"));
    let other = opened(&TinyModel::new().set("/recursion/knowledge_dim", 7));
    let mut answerer = other.answerer(AnswererOptions::default()).unwrap();
    assert_eq!(many(&mut answerer, &QUESTIONS, Some(Knowledge::Vector(&[0.5; 7]))).len(), 3);
    let error = answerer.ask_many(&QUESTIONS, Some(Knowledge::Text("red")), &mut |_, _| {}).unwrap_err();
    assert!(error.to_string().contains("knowledge vectors of length 7"), "{error}");
    let memory = KnowledgeMemory::build(&other, &["red"], &mut |_, _| {}).unwrap();
    assert!(other.answerer(AnswererOptions { memory: Some(memory), ..Default::default() }).is_err());
}

#[test]
fn earlier_phases_do_what_they_can() {
    let mut tiny = TinyModel { phase: 1, ..TinyModel::new() };
    let first = opened(&tiny);
    let answer = first.ask(QUESTIONS[0]).unwrap();
    assert_eq!(answer.text, answer.nearest[0].0);
    assert!(answer.confidence >= 1.0 / 3.0 && answer.confused.is_none());
    assert!(matches!(first.generate(&[], &GenerationConfig::default()), Err(Error::Absent(_))));
    let none = AnswererOptions { known_answers: Some(Vec::new()), ..Default::default() };
    assert!(matches!(first.answerer(none.clone()).err(), Some(Error::Absent(_))));
    tiny.phase = 2;
    let second = opened(&tiny);
    let answer = second.answerer(none).unwrap().ask(QUESTIONS[0]).unwrap();
    assert_eq!((answer.nearest.len(), answer.confusion), (0, None));
    let mut answerer = second.answerer(AnswererOptions::default()).unwrap();
    assert!(answerer.ask_many(&QUESTIONS, Some(Knowledge::Vector(&[0.0; 24])), &mut |_, _| {}).is_err());
    // Version 1 of the format has no known answers and no floor.
    let old = opened(&TinyModel { format_version: 1, ..TinyModel::new() });
    assert!(old.known_answers().is_empty() && old.recursion().unwrap().memory_floor == -1.0);
    assert_eq!(old.class_defaults(), (0.07, "{}"));
    assert!(old.ask(QUESTIONS[0]).unwrap().nearest.is_empty());
}

#[test]
fn warns_of_a_script_it_has_not_learnt() {
    let model = model(false, -1.0);
    let warnings = |question: &str| model.ask(Sample::question(question)).unwrap().warnings;
    assert!(warnings("What \"color\"?").is_empty());
    assert_eq!(
        warnings("日本\"?"),
        ["\"日本\\\"?\": the tokenizer has not seen this script in training; the answer means little"]
    );
    assert_eq!(
        warnings("What is 日?"),
        ["\"What is 日?\": the tokenizer has not seen the characters 日 in training; the answer means little"]
    );
}

#[test]
fn a_saved_memory_belongs_to_one_encoder() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("facts.safetensors");
    let first = model(false, -1.0);
    let memory = KnowledgeMemory::build(&first, &["red", "blue", "red"], &mut |_, _| {}).unwrap();
    assert_eq!(memory.texts(), ["red", "blue"]);
    memory.save(&path).unwrap();
    assert_eq!(KnowledgeMemory::open(&first, &path, &mut |_, _| {}).unwrap(), memory);
    std::fs::write(folder.path().join("facts.txt"), "red\n blue \n\n").unwrap();
    assert_eq!(KnowledgeMemory::open(&first, folder.path().join("facts.txt"), &mut |_, _| {}).unwrap(), memory);
    for other in [TinyModel { seed: 1, ..TinyModel::new() }, TinyModel::new().dtype("bfloat16")] {
        let error = KnowledgeMemory::open(&opened(&other), &path, &mut |_, _| {}).unwrap_err();
        assert!(error.to_string().contains("made with another Y-Encoder"), "{error}");
    }
    assert_eq!(opened(&TinyModel::new()).encoder_digest(), first.encoder_digest());
}
