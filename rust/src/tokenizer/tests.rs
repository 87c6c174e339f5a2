use std::collections::BTreeMap;

use proptest::prelude::*;
use serde_json::json;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

use super::*;

const MERGES: [(&str, &str); 8] =
    [("h", "e"), ("l", "l"), ("ll", "o"), ("he", "llo"), ("r", "e"), ("re", "d"), ("Ġ", "red"), ("Ã", "©")];

/// A byte-level BPE as the Python half trains it, with few merges: 267 tokens.
pub(crate) fn tiny() -> Value {
    let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let mut tokens: Vec<String> = ["<pad>", "<bos>", "<eos>"].map(String::from).into();
    tokens.extend(alphabet.into_iter().map(String::from));
    tokens.extend(MERGES.iter().map(|(left, right)| format!("{left}{right}")));
    let vocab: BTreeMap<&String, usize> = tokens.iter().zip(0..).collect();
    let added: Vec<Value> = (0..3)
        .map(|id| {
            json!({"id": id, "content": tokens[id], "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        })
        .collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": vocab, "merges": MERGES}
    })
}

fn read(value: &Value) -> Result<Tokenizer, String> {
    Tokenizer::from_bytes("tokenizer.json", value.to_string().as_bytes()).map_err(|error| error.to_string())
}

fn message(change: impl FnOnce(&mut Value)) -> String {
    let mut value = tiny();
    change(&mut value);
    let message = read(&value).err().expect("not a tokenizer");
    assert!(message.starts_with("tokenizer.json: ") && !message.contains('\n'), "{message}");
    message
}

#[test]
fn encodes_cuts_and_decodes() {
    let tokenizer = read(&tiny()).unwrap();
    assert_eq!((tokenizer.pad_id(), tokenizer.bos_id(), tokenizer.eos_id()), (0, 1, 2));
    assert_eq!(tokenizer.vocab_size(), 267);
    let encoded = tokenizer.encode("hello red", 64).unwrap();
    assert_eq!((encoded.ids, encoded.truncated), (vec![1, 262, 265, 2], false));
    let cut = tokenizer.encode("hello red", 3).unwrap();
    assert_eq!((cut.ids, cut.truncated), (vec![1, 262, 2], true));
    assert_eq!(tokenizer.encode("", 64).unwrap().ids, [1, 2]);
    for text in ["hello red", "<eos>", "  \t\n", "שלום 日本 😀\u{0}", &"long ".repeat(2000)] {
        let ids = tokenizer.encode(text, usize::MAX).unwrap().ids;
        assert_eq!(tokenizer.decode(&ids).unwrap(), text);
        assert!(!ids[1..ids.len() - 1].contains(&2), "{text:?} gave a special token");
    }
    assert_eq!(tokenizer.decode(&[1, 262, 999_999, 2, 0]).unwrap(), "hello");
}

#[test]
fn names_the_characters_it_has_no_token_for() {
    let tokenizer = read(&tiny()).unwrap();
    assert_eq!(tokenizer.unlearned("hello zzz").unwrap(), "");
    assert_eq!(tokenizer.unlearned("é is learned, ü日ü😀日 are not").unwrap(), "ü日😀");
    let mut words = tiny();
    words["model"] =
        json!({"type": "WordLevel", "vocab": {"<pad>": 0, "<bos>": 1, "<eos>": 2, "?": 3, "à": 4}, "unk_token": "?"});
    words["pre_tokenizer"] = json!({"type": "Whitespace"});
    words["decoder"] = Value::Null;
    assert_eq!(read(&words).unwrap().unlearned("à ñ b").unwrap(), "ñ");
}

#[test]
fn reads_the_names_and_kinds_of_other_projects() {
    let mut value = tiny();
    for (id, name) in ["[PAD]", "[CLS]", "[SEP]"].into_iter().enumerate() {
        value["added_tokens"][id]["content"] = json!(name);
    }
    let vocab = json!({"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3, "red": 4, "##s": 5});
    value["model"] = json!({"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                            "max_input_chars_per_word": 100, "vocab": vocab});
    value["normalizer"] = json!({"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
                                 "strip_accents": null, "lowercase": true});
    value["pre_tokenizer"] = json!({"type": "BertPreTokenizer"});
    value["decoder"] = json!({"type": "WordPiece", "prefix": "##", "cleanup": true});
    value["truncation"] = json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
    let tokenizer = read(&value).unwrap();
    assert_eq!(tokenizer.encode("Reds [SEP] red", 64).unwrap().ids, [1, 4, 5, 3, 3, 3, 4, 2]);
    assert_eq!(tokenizer.decode(&[1, 4, 5, 2]).unwrap(), "reds");
}

/// The tiny tokenizer with other names for its special tokens; those without a name are ordinary then.
fn renamed(names: [Option<&str>; 3]) -> Value {
    let mut value = tiny();
    for (id, old) in ["<pad>", "<bos>", "<eos>"].into_iter().enumerate() {
        let name = names[id].map_or_else(|| format!("ordinary{id}"), String::from);
        let vocab = value["model"]["vocab"].as_object_mut().unwrap();
        vocab.remove(old);
        vocab.insert(name.clone(), json!(id));
        value["added_tokens"][id]["content"] = json!(name);
    }
    value
}

#[test]
fn one_token_may_be_several_of_pad_bos_and_eos() {
    for (layout, names, expected) in [
        ("GPT-NeoX", [Some("<|padding|>"), None, Some("<|endoftext|>")], (0, 2, 2)),
        ("CLIP", [None, Some("<|startoftext|>"), Some("<|endoftext|>")], (2, 1, 2)),
        ("Llama", [None, Some("<s>"), Some("</s>")], (2, 1, 2)),
        ("GPT-2", [None, None, Some("<|endoftext|>")], (2, 2, 2)),
        ("DeepSeek", [None, Some("<｜begin▁of▁sentence｜>"), Some("<｜end▁of▁sentence｜>")], (2, 1, 2)),
        ("Cohere", [Some("<PAD_TOKEN>"), Some("<BOS_TOKEN>"), Some("<EOS_TOKEN>")], (0, 1, 2)),
        ("Qwen", [None, Some("<|im_start|>"), Some("<|im_end|>")], (2, 2, 2)),
    ] {
        let tokenizer = read(&renamed(names)).unwrap();
        assert_eq!((tokenizer.pad_id(), tokenizer.bos_id(), tokenizer.eos_id()), expected, "{layout}");
        let ids = tokenizer.encode("hello red", 64).unwrap().ids;
        assert_eq!(ids, [expected.1, 262, 265, 2], "{layout}");
        assert_eq!(tokenizer.decode(&ids).unwrap(), "hello red", "{layout}");
    }
}

#[test]
fn says_that_eos_is_missing() {
    let message = message(|value| *value = renamed([Some("<pad>"), Some("<bos>"), None]));
    assert!(message.contains("it has no eos token; add one of <eos>, </s>, "), "{message}");
}

/// Each of these made the library panic, loop, or take memory without end.
#[test]
fn what_the_library_cannot_bear_is_an_error() {
    type Change<'a> = &'a dyn Fn(&mut Value);
    let all: [(&str, Change<'_>); 16] = [
        ("added_tokens: the normalizer leaves nothing of \" \"", &|v| {
            v["normalizer"] = json!({"type": "Strip", "strip_left": true, "strip_right": true});
            let space = json!({"id": 3, "content": " ", "single_word": false, "lstrip": false, "rstrip": false,
                               "normalized": true, "special": false});
            v["added_tokens"].as_array_mut().unwrap().push(space);
        }),
        ("model.merges: \"hellore\" is not in the vocabulary", &|v| {
            v["model"]["merges"].as_array_mut().unwrap().push(json!(["hello", "re"]))
        }),
        ("model.merges: \"e\" lacks the continuing_subword_prefix \"##\"", &|v| {
            v["model"]["continuing_subword_prefix"] = json!("##")
        }),
        ("model.merges: \"abc\" is no pair of tokens", &|v| v["model"]["merges"] = json!(["abc"])),
        ("model.vocab: \"<eos>\" has the impossible id 4294967295", &|v| {
            v["model"]["vocab"]["<eos>"] = json!(u32::MAX)
        }),
        ("added_tokens: ", &|v| v["added_tokens"][0]["id"] = json!(u32::MAX)),
        ("decoder: it is no object", &|v| v["decoder"] = json!(5)),
        ("decoder: it has no type", &|v| v["decoder"] = json!({"prefix": "##"})),
        ("pre_tokenizer: FixedLength pieces of length 0", &|v| {
            v["pre_tokenizer"] = json!({"type": "FixedLength", "length": 0})
        }),
        ("decoder: Strip with a stop", &|v| {
            v["decoder"] = json!({"type": "Strip", "content": "l", "start": 0, "stop": 9})
        }),
        ("normalizer: a Precompiled table", &|v| {
            v["normalizer"] = json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"})
        }),
        ("normalizer: its replacements would make texts more than 4096 times longer", &|v| {
            let double = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aa"});
            v["normalizer"] = json!({"type": "Sequence", "normalizers": vec![double; 40]})
        }),
        ("pre_tokenizer: its patterns have more than 4096 bytes", &|v| {
            let split = json!({"type": "Split", "pattern": {"Regex": "\\w{99}".repeat(90)}, "behavior": "Removed",
                               "invert": false});
            v["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": vec![split; 40]})
        }),
        ("decoder: BPEDecoder must be the only one", &|v| {
            let decoders = [json!({"type": "Fuse"}), json!({"type": "BPEDecoder", "suffix": "</w>"})];
            v["decoder"] = json!({"type": "Sequence", "decoders": decoders})
        }),
        ("post_processor: its replacements would make texts more than 4096 times longer", &|v| {
            let twice = vec![json!({"Sequence": {"id": "A", "type_id": 0}}); 2];
            let double = json!({"type": "TemplateProcessing", "single": twice, "pair": [], "special_tokens": {}});
            v["post_processor"] = json!({"type": "Sequence", "processors": vec![double; 40]})
        }),
        ("model: it is missing", &|v| drop(v.as_object_mut().unwrap().remove("model"))),
    ];
    for (expected, change) in all {
        let message = message(change);
        assert!(message.contains(expected), "{message}\n  expected {expected}");
    }
}

#[test]
fn a_text_has_the_same_ids_each_time() {
    for dropout in [json!(null), json!(0), json!(0.0)] {
        let mut value = tiny();
        value["model"]["dropout"] = dropout;
        assert!(read(&value).is_ok(), "{value}");
    }
    for dropout in [json!(0.1), json!(1), json!(-1e-9), json!("0")] {
        let message = message(|value| value["model"]["dropout"] = dropout);
        assert!(message.contains("model.dropout: ") && message.contains("set it to null"), "{message}");
    }
}

#[test]
fn an_empty_answer_of_plain_byte_pair_encoding_is_empty() {
    let mut value = tiny();
    value["decoder"] = json!({"type": "BPEDecoder", "suffix": "</w>"});
    let tokenizer = read(&value).unwrap();
    for ids in [&[][..], &[1, 2], &[99_999]] {
        assert_eq!(tokenizer.decode(ids).unwrap(), "");
    }
}

#[test]
fn a_key_that_stands_twice_is_checked_as_it_is_read() {
    let text = tiny().to_string();
    let twice = text.replacen("\"decoder\":", "\"decoder\":5,\"decoder\":", 1);
    assert_ne!(text, twice);
    assert_eq!(Tokenizer::from_bytes("t", twice.as_bytes()).unwrap().vocab_size(), 267);
}

#[test]
fn a_panic_of_the_library_is_an_error() {
    let error = guarded::<()>(|| panic!("at {}", 1)).expect_err("a panic");
    assert_eq!(error, "the library failed: at 1");
}

/// Parts with ordinary and with odd settings.
fn part(key: &str) -> impl Strategy<Value = Value> {
    let patterns = ["", "a", " ", "(?=a)", "\\w+|", "(?<!x)\\s*", "(a*)*b", "\\p{L}", "^", "."];
    let pattern = prop_oneof![
        prop::sample::select(patterns.to_vec()).prop_map(|p| json!({"Regex": p})),
        prop::sample::select(vec!["", "a", "é", " "]).prop_map(|p| json!({"String": p})),
    ];
    let text = prop::sample::select(vec!["", " ", "a", "▁", "é", "##", "aa", "</w>"]);
    let character = prop::sample::select(vec![" ", "a", "▁", "é"]);
    let behaviour =
        prop::sample::select(vec!["Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"]);
    let kinds: Vec<&str> = match key {
        "normalizer" => vec![
            "BertNormalizer",
            "Strip",
            "StripAccents",
            "NFC",
            "NFKD",
            "Lowercase",
            "Nmt",
            "Replace",
            "Prepend",
            "ByteLevel",
        ],
        "pre_tokenizer" => vec![
            "BertPreTokenizer",
            "ByteLevel",
            "CharDelimiterSplit",
            "Metaspace",
            "Whitespace",
            "Split",
            "Punctuation",
            "WhitespaceSplit",
            "Digits",
            "UnicodeScripts",
            "FixedLength",
        ],
        "decoder" => {
            vec!["BPEDecoder", "ByteLevel", "WordPiece", "Metaspace", "CTC", "Replace", "Fuse", "Strip", "ByteFallback"]
        }
        _ => vec!["BertProcessing", "RobertaProcessing", "ByteLevel", "TemplateProcessing"],
    };
    let kind = prop::sample::select(kinds);
    (kind, pattern, (text.clone(), text), character, behaviour, 0..4_usize, any::<bool>(), any::<bool>()).prop_map(
        |(kind, pattern, (text, other), character, behaviour, n, yes, also)| {
            // every member that any kind knows: each takes its own
            json!({
                "type": kind, "pattern": pattern, "content": if kind == "Strip" { character } else { text },
                "prepend": text, "behavior": behaviour, "invert": yes, "delimiter": character, "length": n,
                "replacement": character, "prepend_scheme": (["always", "first", "never"][n % 3]), "split": also,
                "individual_digits": yes, "add_prefix_space": n % 3 != 2, "trim_offsets": also, "use_regex": yes,
                "clean_text": yes, "handle_chinese_chars": also, "strip_accents": null, "lowercase": yes,
                "strip_left": yes, "strip_right": also, "suffix": text, "prefix": other, "cleanup": yes,
                "pad_token": text, "word_delimiter_token": other, "start": n, "stop": n / 3,
                "sep": ["<eos>", 2], "cls": ["<bos>", 1],
                "single": vec![json!({"Sequence": {"id": "A", "type_id": 0}}); n], "pair": [], "special_tokens": {}
            })
        },
    )
}

/// Models with ordinary and with odd settings.
fn model() -> impl Strategy<Value = Value> {
    let words = prop::collection::btree_set(
        prop::sample::select(vec!["", "a", "##a", "é", "aa", "a</w>", "<0x61>", "?", "hello", " "]),
        0..9,
    );
    let option = prop::option::of(prop::sample::select(vec!["", "##", "</w>", "?", "é"]));
    (prop::sample::select(vec!["BPE", "WordPiece", "WordLevel", "Unigram"]), words, (option.clone(), option.clone(), option), any::<bool>(), any::<bool>(), 0..4_usize)
        .prop_map(|(kind, words, (unknown, prefix, suffix), yes, also, n)| {
            let names: Vec<&str> = ["<pad>", "<bos>", "<eos>"].into_iter().chain(words).collect();
            let vocab: BTreeMap<&str, usize> = names.iter().copied().zip((0..).map(|id| id * (n + 1) / 2)).collect();
            let scores: Vec<(&str, f64)> = names.iter().copied().zip([0.0, -1.5, 3.0, 1e308].into_iter().cycle()).collect();
            json!({
                "type": kind, "vocab": if kind == "Unigram" { json!(scores) } else { json!(vocab) },
                "unk_token": if kind == "BPE" { json!(unknown) } else { json!(unknown.unwrap_or("?")) },
                "unk_id": n, "continuing_subword_prefix": if kind == "BPE" { json!(prefix) } else { json!(prefix.unwrap_or("")) },
                "end_of_word_suffix": suffix, "fuse_unk": yes, "byte_fallback": also, "ignore_merges": yes,
                "dropout": null, "max_input_chars_per_word": n * 3,
                "merges": if also { json!([["a", "a"], ["a", "##a"], ["é", ""]][..n.min(3)]) } else { json!([]) }
            })
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever is put together out of the library's parts is refused, fails with an error, or works.
    #[test]
    fn odd_tokenizers_are_refused_or_work(
        model in prop::option::weighted(0.7, model()),
        normalizers in prop::collection::vec(part("normalizer"), 0..3),
        pretokenizers in prop::collection::vec(part("pre_tokenizer"), 0..3),
        decoders in prop::collection::vec(part("decoder"), 0..3),
        processors in prop::collection::vec(part("post_processor"), 0..2),
        added in (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>()),
    ) {
        let mut value = tiny();
        if let Some(model) = model {
            value["model"] = model;
        }
        value["normalizer"] = json!({"type": "Sequence", "normalizers": normalizers});
        value["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": pretokenizers});
        value["decoder"] = json!({"type": "Sequence", "decoders": decoders});
        value["post_processor"] = json!({"type": "Sequence", "processors": processors});
        for content in ["hello", "é", " "] {
            let token = json!({"id": 3, "content": content, "single_word": added.0, "lstrip": added.1, "rstrip": added.2,
                               "normalized": added.3, "special": false});
            value["added_tokens"].as_array_mut().unwrap().push(token);
        }
        let run = |text: &str| -> Result<(), String> {
            let tokenizer = read(&value)?;
            let ids = tokenizer.encode(text, 999).map_err(|error| error.to_string())?.ids;
            tokenizer.unlearned(text).map_err(|error| error.to_string())?;
            tokenizer.decode(&ids).map_err(|error| error.to_string())?;
            tokenizer.decode(&[0, 3, 4, 99_999]).map(drop).map_err(|error| error.to_string())
        };
        for text in ["", "a", " hello  hello é", "aaa##a </w>", "日本 e\u{301}\u{200b} ﷺ\n", "12a3 é! <eos>"] {
            if let Err(message) = run(text) {
                prop_assert!(message.starts_with("tokenizer.json: ") && !message.contains('\n'), "{message}");
            }
        }
    }

    /// No bytes make it panic; whatever is still a tokenizer encodes.
    #[test]
    fn changed_files_are_read_or_refused(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)) {
        let mut bytes = tiny().to_string().into_bytes();
        for (place, byte) in changes {
            let place = place.index(bytes.len());
            bytes[place] = byte;
        }
        if let Ok(tokenizer) = Tokenizer::from_bytes("tokenizer.json", &bytes) {
            let encoded = tokenizer.encode("hello <eos> red é日", 16);
            if let Ok(encoded) = encoded {
                let _ = tokenizer.decode(&encoded.ids);
            }
        }
    }
}
