use super::*;

/// The pictures of a page.
fn pictures(page: &str) -> Vec<&str> {
    page.split("<svg").skip(1).map(|rest| &rest[..rest.find("</svg>").expect("closed")]).collect()
}

/// Fails unless `xml` is balanced, quoted and escaped, and every number in a coordinate is finite.
fn assert_well_formed(xml: &str) {
    let mut open: Vec<&str> = vec![];
    let mut rest = xml;
    while let Some(start) = rest.find('<') {
        assert_text(&rest[..start]);
        let end = start + rest[start..].find('>').expect("a tag ends");
        let tag = &rest[start + 1..end];
        rest = &rest[end + 1..];
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name), "in {xml}");
            continue;
        }
        let name = tag.split([' ', '/']).next().expect("a name");
        assert_eq!(tag.matches('"').count() % 2, 0, "quotes of <{tag}>");
        let outside: String = tag.trim_end_matches('/').split('"').step_by(2).collect();
        let attributes = outside.strip_prefix(name).expect("the name first");
        assert!(attributes.chars().all(|c| c.is_ascii_alphanumeric() || " =-".contains(c)), "<{tag}>");
        tag.split('"').skip(1).step_by(2).for_each(assert_text);
        if !tag.ends_with('/') {
            open.push(name);
        }
    }
    assert_eq!(open, Vec::<&str>::new(), "left open in {xml}");
}

fn assert_text(text: &str) {
    assert!(!text.contains('"') && !text.contains('>'), "{text}");
    for entity in text.split('&').skip(1) {
        let name = entity.split(';').next().expect("split gives one");
        assert!(["lt", "gt", "amp", "quot", "#39"].contains(&name), "&{name}");
    }
    assert!(text.chars().all(|c| !c.is_control() || c == '\n'), "{text:?}");
}

/// Fails if a picture is broken or holds a number that is not one.
pub(super) fn assert_sound(page: &str) {
    for picture in pictures(page) {
        assert_well_formed(&format!("<svg{picture}</svg>"));
        let attribute = |name: &str| {
            picture.split(name).skip(1).map(|rest| rest.split('"').next().unwrap_or("")).collect::<String>()
        };
        let coordinates = [
            " d=\"",
            " x=\"",
            " y=\"",
            " x1=\"",
            " x2=\"",
            " y1=\"",
            " y2=\"",
            " cx=\"",
            " cy=\"",
            " viewBox=\"",
        ]
        .map(attribute)
        .concat();
        assert!(!coordinates.contains("NaN") && !coordinates.contains("inf"), "{picture}");
    }
}

#[test]
fn a_whole_report_is_sound_small_and_needs_no_network() {
    let page = html(&fixture::report());
    assert_sound(&page);
    assert!(page.len() < 150_000, "{} bytes", page.len());
    for outside in ["http:", "https:", "//", "url(", "@import", "<script", "<link", "<img", "src=", "href="] {
        assert!(!page.contains(outside), "{outside}");
    }
    let titles = [
        "Recall by frequency",
        "Recall by choice",
        "Held-out text",
        "Recall by relation",
        "Perplexity by label",
        "Samples",
        "Loss while training",
        "The cluster tree",
        "The run",
    ];
    let places: Vec<_> = titles.iter().map(|title| page.find(&format!("<h2>{title}</h2>"))).collect();
    assert!(places.iter().all(Option::is_some) && places.is_sorted(), "{places:?}");
    assert!(page == html(&fixture::report()), "the same report is the same page");
}

#[test]
fn an_empty_report_is_a_page_that_says_so() {
    let page = html(&Report::default());
    assert!(page.contains("<h1>Nothing was measured in this run.</h1>"), "{page}");
    assert!(!page.contains("<section>") && !page.contains("<aside>") && pictures(&page).is_empty());
}

#[test]
fn each_part_alone_gives_its_section_alone() {
    let full = fixture::report();
    let parts = [
        Report { curves: full.curves, ..Report::default() },
        Report { memories: full.memories, ..Report::default() },
        Report { recall: full.recall, ..Report::default() },
        Report { recall_held_out: full.recall_held_out, ..Report::default() },
        Report { recall_choice: full.recall_choice, ..Report::default() },
        Report { relations: full.relations, ..Report::default() },
        Report { labels: full.labels, ..Report::default() },
        Report { cluster_sizes: full.cluster_sizes, ..Report::default() },
        Report { samples: full.samples, ..Report::default() },
    ];
    for part in parts {
        let page = html(&part);
        assert_sound(&page);
        assert_eq!(page.matches("<section>").count(), 1, "{page}");
    }
}

#[test]
fn the_headline_compares_fetched_memory_with_the_fairest_control_first() {
    let report = fixture::report();
    let said = headline::findings(&report);
    let percents = "41\u{202f}% of the questions to the letter with fetched memory, 9\u{202f}% with always-on memory \
                    and 2\u{202f}% without memory";
    let recall = format!(
        "Asked about the rarest entities (4\u{2060}–\u{2060}9 exposures), the model answers {percents}."
    );
    assert_eq!(said[0], recall);
    let held_out = "On held-out text, perplexity is 22.29 with fetched memory, 27.72 with always-on memory and 30.33 \
                    without memory.";
    assert_eq!(said[1], held_out);
    assert!(said[2].starts_with("Validation loss fell from 10.01 to 3.2"), "{}", said[2]);
    assert!(said[2].ends_with("nats per token over 65.5\u{202f}M tokens."), "{}", said[2]);
    assert_eq!(said.len(), 3);
}

#[test]
fn the_headline_admits_what_is_not_shown_by_the_numbers() {
    let mut report = fixture::report();
    report.recall[2].buckets[0] = Some(Rate { mean: 0.3, low: 0.2, high: 0.4, n: 50 });
    let said = headline::findings(&report);
    assert_eq!(
        said[1],
        "The 95\u{202f}% intervals with fetched memory and with always-on memory overlap there (n = 240)."
    );

    report.recall.iter_mut().for_each(|row| row.buckets[0] = None);
    let said = headline::findings(&report);
    assert!(
        said[0].starts_with("Asked about entities of frequency 10\u{2060}–\u{2060}29 exposures, the model"),
        "{}",
        said[0]
    );

    let mut points: Vec<(u64, f64)> = (0..10).map(|i| (i * 1000, 2.0 + i as f64)).collect();
    let curve = |points: &[(u64, f64)]| {
        let curve = Curve { name: "training".into(), validation: false, points: points.to_vec() };
        headline::findings(&Report { curves: vec![curve], ..Report::default() })
    };
    assert_eq!(
        curve(&points),
        ["Training loss rose from 2.00 to 11.00 nats per token over 9\u{202f}k tokens."]
    );
    points[9].1 = f64::NAN;
    assert_eq!(curve(&points), ["Training loss stopped being a number at 9\u{202f}k tokens."]);
}

#[test]
fn hostile_text_stays_text() {
    let bad = "</title><script>alert('x')</script>\"&\0".to_string();
    let mut report = fixture::report();
    report.run = bad.clone();
    report.summary = vec![(bad.clone(), bad.clone())];
    report.buckets = vec![bad.clone()];
    report.curves[0].name = bad.clone();
    report.memories[0].memory = bad.clone();
    report.memories[1].note = bad.clone();
    report.recall[0].memory = bad.clone();
    report.relations[0].relation = bad.clone();
    report.relations[0].by_memory[0].0 = bad.clone();
    report.labels[0].label = bad.clone();
    report.samples = vec![Sample {
        prompt: bad.clone(),
        answer: bad.clone(),
        path: bad.clone(),
        outputs: vec![(bad.clone(), bad.clone())],
    }];
    let page = html(&report);
    assert_sound(&page);
    assert!(!page.contains("<script") && !page.contains("alert('x')") && !page.contains('\0'));
    assert!(page.matches("&lt;script&gt;").count() >= 10);
}

#[test]
fn numbers_that_are_none_are_dashes_and_gaps() {
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let mut report = fixture::report();
        report.curves[1].points[3].1 = bad;
        report.recall[3].buckets[1] = Some(Rate { mean: bad, low: bad, high: bad, n: 0 });
        report.recall[2].buckets[4] = None;
        report.memories[0].loss = Rate { mean: bad, low: bad, high: bad, n: 0 };
        report.memories[0].perplexity = bad;
        report.relations[0].by_memory[3].1 = bad;
        report.labels[0].by_memory[3].1 = bad;
        let page = html(&report);
        assert_sound(&page);
        assert!(!page.contains("NaN") && !page.contains("inf<"));
        assert!(page.matches("<td class=\"n\">–</td>").count() >= 5, "{page}");
        let everything_bad = Report {
            curves: vec![Curve {
                name: "training".into(),
                validation: false,
                points: vec![(1, bad), (2, bad)],
            }],
            recall: vec![RecallRow { memory: "none".into(), buckets: vec![report.recall[3].buckets[1]] }],
            memories: vec![report.memories[0].clone()],
            labels: vec![LabelRow { label: "a".into(), tokens: 0, by_memory: vec![("none".into(), bad)] }],
            relations: vec![RelationRow {
                relation: "a".into(),
                n: 0,
                by_memory: vec![("none".into(), bad)],
            }],
            ..Report::default()
        };
        assert_sound(&html(&everything_bad));
    }
}

#[test]
fn extreme_numbers_do_not_break_a_picture() {
    for loss in [f64::MAX, -f64::MAX, f64::MIN_POSITIVE, 1e99, 0.0, -3.0] {
        let curve = |points: Vec<(u64, f64)>| Curve { name: "none".into(), validation: true, points };
        let label = LabelRow { label: "a".into(), tokens: u64::MAX, by_memory: vec![("none".into(), loss)] };
        let memory = MemoryRow {
            memory: "none".into(),
            loss: Rate { mean: loss, low: loss, high: loss, n: usize::MAX },
            perplexity: loss,
            parameters: u64::MAX,
            note: String::new(),
        };
        let report = Report {
            curves: vec![curve(vec![(0, loss), (u64::MAX, loss), (u64::MAX, 0.0)]), curve(vec![(7, loss)])],
            labels: vec![label],
            memories: vec![memory],
            cluster_sizes: vec![vec![], vec![0], vec![0, 0], vec![u64::MAX, 0, 1], vec![5; 151]],
            ..Report::default()
        };
        assert_sound(&html(&report));
    }
}

#[test]
fn a_huge_report_makes_a_page_of_bounded_size() {
    let mut report = fixture::report();
    let curves = fixture::curves(50_000);
    report.curves = (0..30).map(|i| Curve { name: format!("run {i}"), ..curves[i % 2].clone() }).collect();
    report.relations = (0..500).map(|_| report.relations[0].clone()).collect();
    report.labels = (0..3000)
        .map(|i| LabelRow { label: format!("book {i}").repeat(99), ..report.labels[0].clone() })
        .collect();
    report.samples =
        (0..900).map(|_| Sample { prompt: "long ".repeat(5000), ..report.samples[0].clone() }).collect();
    let page = html(&report);
    assert_sound(&page);
    assert!(page.len() < 330_000, "{} bytes", page.len());
    for left_off in
        ["the 40 of 500 with", "the 40 of 3,000 with", "first 24 of 900 samples", "first 8 of 30 curves"]
    {
        assert!(page.contains(left_off), "{left_off}");
    }
}

#[test]
fn a_written_report_reads_back_with_its_gaps() {
    let mut report = fixture::report();
    let text = serde_json::to_string(&report).expect("serializes");
    let back: Report = serde_json::from_str(&text).expect("reads");
    // Numbers may lose their last bit on the way.
    let close = |a: f64, b: f64| (a - b).abs() <= 1e-14 * a.abs();
    assert!(close(
        back.recall[3].buckets[0].expect("asked").low,
        report.recall[3].buckets[0].expect("asked").low
    ));
    for (a, b) in back.curves.iter().zip(&report.curves) {
        assert_eq!((&a.name, a.validation, a.points.len()), (&b.name, b.validation, b.points.len()));
        assert!(a.points.iter().zip(&b.points).all(|(a, b)| a.0 == b.0 && close(a.1, b.1)));
    }
    assert_eq!((&back.samples, &back.cluster_sizes), (&report.samples, &report.cluster_sizes));
    assert_eq!(back.recall.len(), report.recall.len());
    report.memories[0].perplexity = f64::INFINITY;
    report.curves[0].points[7].1 = f64::NAN;
    report.labels[0].by_memory[0].1 = f64::NAN;
    let text = serde_json::to_string(&report).expect("serializes");
    let back: Report = serde_json::from_str(&text).expect("reads");
    assert!(back.memories[0].perplexity.is_nan() && back.curves[0].points[7].1.is_nan());
}

#[test]
fn bucket_labels_share_their_unit() {
    let labels = |labels: &[&str], n| {
        charts::bucket_labels(&labels.iter().map(|l| l.to_string()).collect::<Vec<_>>(), n)
    };
    assert_eq!(labels(&["4–9 seen", "10+ seen"], 2), (vec!["4–9".into(), "10+".into()], "seen".into()));
    assert_eq!(labels(&["rare", "often seen"], 2).1, "");
    assert_eq!(
        labels(&["a b"], 3),
        (vec!["a b".into(), "bucket 2".into(), "bucket 3".into()], String::new())
    );
}
