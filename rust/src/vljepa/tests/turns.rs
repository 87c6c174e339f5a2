use super::answers::{QUESTIONS, many, model_of};
use super::*;
use crate::memory::{KnowledgeMemory, MemoryKind};

fn weighing() -> TinyModel {
    TinyModel::new().recursion("weighs_knowledge", true).recursion("injector_sees_state", true)
}

pub(super) fn plain(model: &Mamba3Jepa) -> Answerer<'_> {
    model.answerer(AnswererOptions::default()).unwrap()
}

fn with_memory<'m>(model: &'m Mamba3Jepa, facts: &[&str]) -> Answerer<'m> {
    let memory = KnowledgeMemory::build(model, facts, &mut |_, _| {}).unwrap();
    model.answerer(AnswererOptions { memory: Some(memory), ..Default::default() }).unwrap()
}

#[test]
fn an_observed_turn_is_an_answer_without_memory() {
    let model = model_of(&weighing(), true, -1.0);
    let mut answerer = with_memory(&model, &["The sky is green.", "Three circles."]);
    assert!(answerer.has_memory() && !plain(&model).has_memory());
    let expected = many(&mut plain(&model), &QUESTIONS[..1], None).remove(0);
    let turn = answerer.observe(QUESTIONS[0]).unwrap();
    assert_eq!((&turn.answer, turn.question.as_deref()), (&expected, QUESTIONS[0].question));
    assert_eq!((expected.sure, expected.confusion_after, turn.told_answers), (Some(false), None, None));
    assert_eq!(turn.pooled, model.observe(&QUESTIONS[..1]).unwrap()[0].pooled);
    assert_eq!(answerer.observe(QUESTIONS[2]).unwrap().question, None);
    assert!(matches!(answerer.observe(Sample::question(" ")), Err(Error::Input(_))));
}

#[test]
fn observed_turns_belong_to_the_conversation() {
    let model = model_of(&weighing(), false, -1.0);
    let options = AnswererOptions { smooth: true, ..Default::default() };
    let picture = picture(1);
    let turns = [QUESTIONS[0], Sample { question: QUESTIONS[0].question, ..Sample::picture(&picture) }];
    let expected = many(&mut model.answerer(options.clone()).unwrap(), &turns, None).remove(1);
    assert_ne!(expected.smoothed_confusion, expected.confusion);
    let mut answerer = model.answerer(options).unwrap();
    answerer.observe(turns[0]).unwrap();
    let smoothed = answerer.observe(turns[1]).unwrap().answer.smoothed_confusion.unwrap();
    assert!((smoothed - expected.smoothed_confusion.unwrap()).abs() < 1e-5);
}

#[test]
fn what_is_told_moves_the_turn_on() {
    let model = model_of(&weighing(), true, -1.0);
    let (recursion, vector) = (model.recursion().unwrap(), model.embed_text(&["red"]).unwrap().remove(0));
    let probe = recursion.knowledge_probe.as_ref().unwrap();
    let mut answerer = plain(&model);
    let first = answerer.observe(QUESTIONS[0]).unwrap();
    let second = answerer.told(&first, Knowledge::Text("red")).unwrap();
    assert_eq!(second, answerer.told(&first, Knowledge::Vector(&vector)).unwrap());
    assert_eq!(second.pooled, recursion.injector.inject(&first.pooled, &vector).unwrap());
    let answers = probe.score(&first.pooled, &vector).unwrap();
    assert_eq!(second.told_answers, Some(answers));
    // The threshold is 0: whatever is left of the confusion is too much.
    let after = first.answer.confusion.unwrap() * (1.0 - answers);
    assert_eq!((second.answer.confusion_after, second.answer.sure), (Some(after), Some(false)));
    assert_eq!((second.answer.confusion, second.answer.knowledge_used), (first.answer.confusion, true));
    assert_ne!(second.answer.nearest, first.answer.nearest);
    // The same as knowledge that is given with the question.
    let given = many(&mut plain(&model), &QUESTIONS[..1], Some(Knowledge::Text("red"))).remove(0);
    assert_eq!(second.answer, given);

    let third = answerer.told(&second, Knowledge::Text("blue")).unwrap();
    let left = 1.0 - third.told_answers.unwrap();
    assert_eq!(third.answer.confusion_after, Some(after * left), "doubts of everything told are multiplied");
    assert_ne!(third.pooled, second.pooled);

    assert!(matches!(answerer.told(&first, Knowledge::Vector(&[0.0; 3])), Err(Error::Input(_))));
    assert!(matches!(answerer.told(&first, Knowledge::Text(" ")), Err(Error::Input(_))));
    let second_phase = opened(&TinyModel { phase: 2, ..weighing() });
    let turn = plain(&second_phase).observe(QUESTIONS[0]).unwrap();
    assert_eq!(turn.answer.sure, None);
    assert!(matches!(plain(&second_phase).told(&turn, Knowledge::Vector(&vector)), Err(Error::Absent(_))));
}

#[test]
fn who_is_told_an_answer_is_sure_under_the_threshold() {
    let mut model = model_of(&weighing(), true, -1.0);
    let first = plain(&model).observe(QUESTIONS[0]).unwrap();
    let after = plain(&model).told(&first, Knowledge::Text("red")).unwrap().answer.confusion_after.unwrap();
    assert!(after < first.answer.confusion.unwrap());
    for (threshold, is_sure) in [(after, true), (after.next_down(), false)] {
        model.recursion.as_mut().unwrap().confusion_probe.threshold = threshold;
        let mut answerer = plain(&model);
        let turn = answerer.observe(QUESTIONS[0]).unwrap();
        assert_eq!((turn.answer.confused, turn.answer.sure), (Some(true), Some(false)));
        assert_eq!(answerer.told(&turn, Knowledge::Text("red")).unwrap().answer.sure, Some(is_sure));
        let given = many(&mut answerer, &QUESTIONS[..1], Some(Knowledge::Text("red"))).remove(0);
        assert_eq!((given.confusion_after, given.sure), (Some(after), Some(is_sure)));
    }
}

#[test]
fn who_does_not_weigh_what_is_told_believes_it() {
    let model = model_of(&TinyModel::new(), true, -1.0);
    let mut answerer = plain(&model);
    let turn = answerer.observe(QUESTIONS[0]).unwrap();
    let told = answerer.told(&turn, Knowledge::Text("red")).unwrap();
    assert_eq!((told.told_answers, told.answer.confusion_after, told.answer.sure), (None, None, Some(true)));
}

#[test]
fn a_memory_is_looked_up_turn_by_turn() {
    let facts = ["The sky is green.", "Three circles.", "Ask again."];
    for tiny in [weighing(), weighing().recursion("retriever_dim", 9)] {
        let model = model_of(&tiny, true, -1.0);
        let mut answerer = with_memory(&model, &facts);
        let expected = many(&mut answerer, &QUESTIONS[..1], None).remove(0);
        answerer.reset();
        let turn = answerer.observe(QUESTIONS[0]).unwrap();
        let found = answerer.recalled(&turn).unwrap().unwrap();
        assert_eq!((found.kind, Some(&found.text)), (MemoryKind::Fact, expected.memory_used.as_ref()));
        let told = answerer.told(&turn, Knowledge::Vector(found.embedding)).unwrap();
        assert_eq!((told.answer.text, told.answer.sure), (expected.text, expected.sure));
        assert_eq!((told.answer.nearest, told.answer.confusion_after), (expected.nearest, expected.confusion_after));
        assert_eq!(plain(&model).recalled(&turn).unwrap(), None, "no memory");
        let shut = model_of(&tiny, true, 1.1);
        assert_eq!(with_memory(&shut, &facts).recalled(&turn).unwrap(), None, "nothing is near enough");
    }
}
