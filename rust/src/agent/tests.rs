use std::fs;
use std::sync::{Arc, Mutex};

use serde_json::json;

use super::*;
use crate::memory::KnowledgeMemory;
use crate::recursion::Signal;
use crate::testing::{TinyModel, put};
use crate::vljepa::{AnswererOptions, Mamba3Jepa};

const NAMES: [&str; 3] = ["abacus", "memory", "oracle"];
const QUESTION: &str = "What colour is the circle?";

/// What is forced on a model: the selector's logits, that of everything told to be an answer, what is too much confusion.
struct Forced<'a> {
    selector: &'a [f32],
    answers: f32,
    threshold: f32,
}

impl Forced<'_> {
    /// The model, whose selector knows `NAMES`, if it has one.
    fn model(&self) -> Mamba3Jepa {
        let tools = &NAMES[..self.selector.len()];
        let tiny = TinyModel::new().recursion("weighs_knowledge", true).recursion("tools", json!(tools));
        let folder = tempfile::tempdir().unwrap();
        tiny.write(folder.path());
        let recursion = tiny.component_with("recursion", |key, numbers| match key.trim_start_matches("recursion.") {
            "tool_selector.linear.weight" | "knowledge_probe.linear.weight" => numbers.fill(0.0),
            "tool_selector.linear.bias" => numbers.copy_from_slice(self.selector),
            "knowledge_probe.linear.bias" => numbers.fill(self.answers),
            "confusion_probe.threshold" => numbers.fill(self.threshold),
            _ => {}
        });
        put(folder.path(), "recursion", &recursion);
        Mamba3Jepa::options().threads(1).open(folder.path()).unwrap()
    }
}

fn sigmoid(logit: f32) -> f32 {
    1.0 / (1.0 + (-logit).exp())
}

fn near(found: f32, expected: f32) {
    assert!((found - expected).abs() < 1e-6, "{found} is not {expected}");
}

fn says(text: &str) -> impl Tool + 'static {
    let text = text.to_owned();
    move |_: &ToolRequest<'_>| Ok(text.clone())
}

fn fails(_: &ToolRequest<'_>) -> Result<String, ToolError> {
    Err(ToolError("it broke".into()))
}

fn registry(tools: &[(&str, &str)]) -> ToolRegistry {
    let mut registry = ToolRegistry::new();
    for (name, text) in tools {
        registry.add(*name, says(text)).unwrap();
    }
    registry
}

fn plain(model: &Mamba3Jepa, tools: ToolRegistry) -> Mamba3Agent<'_> {
    Mamba3Agent::new(model.answerer(AnswererOptions::default()).unwrap(), tools).unwrap()
}

fn remembering<'m>(model: &'m Mamba3Jepa, tools: ToolRegistry) -> Mamba3Agent<'m> {
    let memory = KnowledgeMemory::build(model, &["the circle is red"], &mut |_, _| {}).unwrap();
    let options = AnswererOptions { memory: Some(memory), ..Default::default() };
    Mamba3Agent::new(model.answerer(options).unwrap(), tools).unwrap()
}

fn calls<'a>(found: &'a AgentAnswer) -> Vec<(&'a str, Option<&'a str>, Option<&'a str>)> {
    let call = |step: &'a Step| match step {
        Step::Call { tool, result, error, .. } => Some((tool.as_str(), result.as_deref(), error.as_deref())),
        _ => None,
    };
    found.trace.iter().filter_map(call).collect()
}

fn kept(found: &AgentAnswer) -> Vec<bool> {
    let kept = |step: &Step| if let Step::Inject { kept, .. } = step { Some(*kept) } else { None };
    found.trace.iter().filter_map(kept).collect()
}

#[test]
fn who_is_not_confused_calls_nothing() {
    let model = Forced { selector: &[0.0; 3], answers: 5.0, threshold: 1.0 }.model();
    let found = plain(&model, registry(&[("abacus", "three")])).run(Sample::question(QUESTION)).unwrap();
    let answer = model.ask(Sample::question(QUESTION)).unwrap();
    assert_eq!((found.stopped, found.tools.len(), found.question.as_str()), (Stop::Sure, 0, QUESTION));
    let seen = Step::Observe {
        answer: answer.text.clone(),
        confidence: answer.confidence,
        confusion: answer.confusion,
        threshold: Some(1.0),
        sure: Some(true),
        signal: None,
    };
    assert_eq!((found.trace, found.answer), (vec![seen], answer));
}

#[test]
fn the_likeliest_tool_is_called_and_what_it_says_injected() {
    let selector = [0.0, 3.0, 1.0]; // the memory is not there
    let confusion = {
        let model = Forced { selector: &selector, answers: 5.0, threshold: 0.0 }.model();
        model.ask(Sample::question(QUESTION)).unwrap().confusion.unwrap()
    };
    let model = Forced { selector: &selector, answers: 5.0, threshold: confusion / 2.0 }.model();
    let asked = Arc::new(Mutex::new(Vec::new()));
    let mut tools = registry(&[("abacus", "three")]);
    let heard = asked.clone();
    let oracle = move |request: &ToolRequest<'_>| {
        let image = request.image.map(Path::to_path_buf);
        heard.lock().unwrap().push((request.question.map(String::from), image));
        Ok("  red\n".into())
    };
    tools.add("oracle", oracle).unwrap();
    let found = plain(&model, tools).run(Sample::question(QUESTION)).unwrap();
    assert_eq!(*asked.lock().unwrap(), [(Some(QUESTION.to_owned()), None)]);
    assert_eq!((found.stopped, &found.tools[..]), (Stop::Sure, &["oracle".to_owned()][..]));
    let [
        Step::Observe { sure: Some(false), signal: Some(Signal::State), .. },
        Step::Call { tool, probability: Some(probability), result, error: None },
        Step::Inject { knowledge, answers: Some(answers), kept: true },
        Step::Observe { answer, confusion: Some(after), sure: Some(true), signal: None, .. },
    ] = &found.trace[..]
    else {
        panic!("{:?}", found.trace);
    };
    let total: f32 = selector.iter().map(|logit| logit.exp()).sum();
    near(*probability, 1_f32.exp() / total);
    near(*answers, sigmoid(5.0));
    near(*after, confusion * (1.0 - sigmoid(5.0)));
    assert_eq!((tool.as_str(), result.as_deref(), knowledge.as_str()), ("oracle", Some("red"), "red"));
    let mut answerer = model.answerer(AnswererOptions::default()).unwrap();
    let told = answerer.ask_many(&[Sample::question(QUESTION)], Some(Knowledge::Text("red")), &mut |_, _| {});
    let told = told.unwrap().remove(0);
    assert_eq!((answer, told.confusion_after), (&told.text, Some(*after)));
    assert_eq!(told, found.answer);
}

#[test]
fn what_does_not_answer_is_put_back_and_the_next_tool_called() {
    let model = Forced { selector: &[1.0, 0.0, 0.5], answers: -3.0, threshold: 0.0 }.model();
    let tools = || registry(&[("abacus", "three"), ("oracle", "four")]);
    let found = remembering(&model, tools()).run(Sample::question(QUESTION)).unwrap();
    assert_eq!(found.tools, ["abacus", "oracle", "memory"]);
    assert_eq!(calls(&found)[2], ("memory", Some("the circle is red"), None));
    assert_eq!((kept(&found), found.stopped), (vec![false; 3], Stop::NoTool));
    assert_eq!(found.answer, model.ask(Sample::question(QUESTION)).unwrap());
    let fewer = remembering(&model, tools()).max_rounds(2).run(Sample::question(QUESTION)).unwrap();
    assert_eq!((&fewer.tools[..], fewer.stopped), (&found.tools[..2], Stop::Rounds));
    let none = plain(&model, tools()).max_rounds(0).run(Sample::question(QUESTION)).unwrap();
    assert_eq!((none.tools.len(), none.stopped), (0, Stop::Rounds));
}

#[test]
fn what_was_told_adds_up() {
    let model = Forced { selector: &[1.0, 0.0, 0.5], answers: 0.5, threshold: 0.0 }.model();
    let mut agent = plain(&model, registry(&[("abacus", "three"), ("oracle", "four")]));
    let found = agent.run(Sample::question(QUESTION)).unwrap();
    let mut turn = agent.answerer.observe(Sample::question(QUESTION)).unwrap();
    for text in ["three", "four"] {
        turn = agent.answerer.told(&turn, Knowledge::Text(text)).unwrap();
    }
    assert_eq!(found.answer, turn.answer);
    assert_eq!(kept(&found), [true, true]);
    let left = (1.0 - sigmoid(0.5)).powi(2);
    near(found.answer.confusion_after.unwrap(), found.answer.confusion.unwrap() * left);
    assert_eq!(found.trace.last(), Some(&Step::seen(&found.answer)));
}

#[test]
fn tools_that_fail_or_are_silent_or_unlikely_are_passed_over() {
    let model = Forced { selector: &[5.0, 0.0, 5.0], answers: 5.0, threshold: 0.0 }.model();
    let mut tools = registry(&[("oracle", " \n"), ("zoo", "a")]);
    tools.add("abacus", fails).unwrap();
    let found = remembering(&model, tools).run(Sample::question(QUESTION)).unwrap();
    assert_eq!(calls(&found), [("oracle", None, None), ("abacus", None, Some("it broke"))]);
    assert_eq!(found.stopped, Stop::NoTool, "the selector never learned of a zoo, and finds the memory unlikely");
    assert_eq!(found.trace.len(), 3);
}

#[test]
fn the_same_twice_is_nothing_new() {
    let model = Forced { selector: &[1.0, 0.0, 0.5], answers: 0.5, threshold: 0.0 }.model();
    let tools = registry(&[("abacus", "four"), ("oracle", "four")]);
    let found = plain(&model, tools).run(Sample::question(QUESTION)).unwrap();
    assert_eq!((&found.tools[..], found.stopped), (&["abacus".to_owned(), "oracle".to_owned()][..], Stop::NothingNew));
    assert_eq!(kept(&found), [true]);
}

#[test]
fn without_a_selector_that_knows_them_tools_are_tried_in_their_order() {
    let model = Forced { selector: &[], answers: -3.0, threshold: 0.0 }.model();
    let found =
        remembering(&model, registry(&[("zoo", "a"), ("abacus", "b")])).run(Sample::question(QUESTION)).unwrap();
    assert_eq!(found.tools, ["memory", "zoo", "abacus"]);
    let strange = Forced { selector: &[0.0; 3], answers: -3.0, threshold: 0.0 }.model();
    let other = plain(&strange, registry(&[("zoo", "a"), ("yard", "b")])).run(Sample::question(QUESTION)).unwrap();
    assert_eq!(other.tools, ["zoo", "yard"]);
    for step in found.trace.iter().chain(&other.trace) {
        assert!(!matches!(step, Step::Call { probability: Some(_), .. }), "{step:?}");
    }
}

#[test]
fn a_tool_is_told_where_the_picture_lies() {
    let model = Forced { selector: &[], answers: -3.0, threshold: 0.0 }.model();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("red.png");
    let mut encoder = png::Encoder::new(fs::File::create(&file).unwrap(), 8, 8);
    encoder.set_color(png::ColorType::Rgb);
    encoder.write_header().unwrap().write_image_data(&[255, 0, 0].repeat(64)).unwrap();
    let mut tools = ToolRegistry::new();
    let shows = |request: &ToolRequest<'_>| Ok(format!("{:?} {:?}", request.question, request.image));
    tools.add("mirror", shows).unwrap();
    let mut agent = plain(&model, tools);
    let found = agent.run(Sample::file(&folder.path().join("./red.png"))).unwrap();
    assert_eq!(calls(&found)[0].1, Some(format!("None Some({file:?})").as_str()));
    assert_eq!(found.question, "Describe the image.");
    let picture = crate::image::load_image(&file).unwrap();
    let found = agent.run(Sample::picture(&picture).asking("what?")).unwrap();
    assert_eq!(calls(&found)[0].1, Some("Some(\"what?\") None"));
    assert_eq!(
        path_of(Some(Image::File(Path::new("a/b.png")))),
        Some(std::env::current_dir().unwrap().join("a/b.png"))
    );
}

#[test]
fn a_model_that_cannot_be_confused_is_no_agent() {
    let folder = tempfile::tempdir().unwrap();
    TinyModel { phase: 2, ..TinyModel::new() }.write(folder.path());
    let model = Mamba3Jepa::from_dir(folder.path()).unwrap();
    let answerer = model.answerer(AnswererOptions::default()).unwrap();
    let Err(Error::Absent(message)) = Mamba3Agent::new(answerer, ToolRegistry::new()) else { panic!("an agent") };
    assert!(message.contains("cannot know when to call a tool"), "{message}");
}

#[test]
fn a_trace_is_written_as_in_python() {
    let trace = [
        Step::Observe {
            answer: "red".into(),
            confidence: 0.5,
            confusion: Some(0.1),
            threshold: Some(0.25),
            sure: Some(true),
            signal: None,
        },
        Step::Call { tool: "zoo".into(), probability: None, result: None, error: Some("it broke".into()) },
        Step::Inject { knowledge: "größer".into(), answers: Some(0.75), kept: true },
    ];
    let expected = concat!(
        r#"[{"step":"observe","answer":"red","confidence":0.5,"confusion":0.10000000149011612,"threshold":0.25,"#,
        r#""sure":true,"signal":null},"#,
        r#"{"step":"call","tool":"zoo","probability":null,"result":null,"error":"it broke"},"#,
        r#"{"step":"inject","knowledge":"größer","answers":0.75,"kept":true}]"#,
    );
    assert_eq!(serde_json::to_string(&trace).unwrap(), expected);
    let stops = [Stop::Sure, Stop::NoTool, Stop::NothingNew, Stop::Rounds];
    assert_eq!(json!(stops), json!(["sure", "no tool", "nothing new", "rounds"]));
}
