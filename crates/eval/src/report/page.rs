//! The page around the sections.

use super::Report;
use super::format::escape;
use super::headline::findings;
use super::sections::sections;

const STYLE: &str = include_str!("style.css");

/// The report as one HTML page that needs nothing else: no script, no font, no network.
///
/// Every text in `report` is escaped. A number that is not finite is printed as "–" and left out of charts.
/// Long curves and tables are thinned (the page says where), so that a page stays below about 300 kB.
pub fn html(report: &Report) -> String {
    let frame = Frame { kind: "Run report", run: &report.run, summary: &report.summary };
    frame.page(&findings(report), &sections(report))
}

/// What stands around the sections of a page.
pub(super) struct Frame<'a> {
    /// What the page is.
    pub(super) kind: &'a str,
    /// The run's name.
    pub(super) run: &'a str,
    /// Facts about the run, each a name and a value.
    pub(super) summary: &'a [(String, String)],
}

impl Frame<'_> {
    /// The page: `findings` are sentences, the first of them its headline; `sections` is markup.
    pub(super) fn page(&self, findings: &[String], sections: &str) -> String {
        let mut findings = findings.iter().map(|finding| escape(finding));
        let headline = findings.next().unwrap_or_default();
        let rest: Vec<String> = findings.collect();
        let rest = match rest.is_empty() {
            true => String::new(),
            false => format!("<p class=\"lede\">{}</p>\n", rest.join(" ")),
        };
        let (run, kind, facts) = (escape(self.run), escape(self.kind), facts(self.summary));
        let title = kind.to_lowercase();
        // Inline style only: should an unescaped text ever reach the page, it could load and run nothing.
        let policy = "default-src 'none'; style-src 'unsafe-inline'";
        format!(
            "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <meta http-equiv=\"Content-Security-Policy\" content=\"{policy}\">\n\
             <meta name=\"color-scheme\" content=\"light dark\">\n\
             <title>{run} · {title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n\
             <div class=\"body\">\n<header>\n<p class=\"run\">{kind} <b>{run}</b></p>\n<h1>{headline}</h1>\n\
             {rest}</header>\n{sections}</div>\n{facts}</main>\n</body>\n</html>\n"
        )
    }
}

/// What the run was: beside the text on a wide screen, after it on a phone.
fn facts(summary: &[(String, String)]) -> String {
    let fact = |(name, value): &(String, String)| {
        format!("<div><dt>{}</dt><dd>{}</dd></div>\n", escape(name), escape(value))
    };
    let facts: String = summary.iter().map(fact).collect();
    match facts.is_empty() {
        true => facts,
        false => format!("<aside>\n<h2>The run</h2>\n<dl>\n{facts}</dl>\n</aside>\n"),
    }
}
