//! The web page, served from the binary: the cluster tree, continuations of a prompt and losses of a text with no,
//! generic and fetched memory beside each other.
//!
//! [`asset`] holds its files. `index.html` belongs at `/`, the others beside it under their names; all of them are
//! sent with [`CONTENT_SECURITY_POLICY`]. The page asks this server alone: `v1/…` relative to where it is.

/// What the page may do: run and show what comes from this server, and ask this server.
pub const CONTENT_SECURITY_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; \
     connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// One file of the page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asset {
    /// The file.
    pub bytes: &'static [u8],
    /// For the header `content-type`.
    pub content_type: &'static str,
    /// For the header `etag`, with its quotes: changes with the bytes.
    pub etag: String,
}

/// Files by name.
const FILES: [(&str, &[u8]); 12] = [
    ("index.html", include_bytes!("index.html")),
    ("style.css", include_bytes!("style.css")),
    ("icon.svg", include_bytes!("icon.svg")),
    ("api.js", include_bytes!("api.js")),
    ("dom.js", include_bytes!("dom.js")),
    ("icicle.js", include_bytes!("icicle.js")),
    ("loss.js", include_bytes!("loss.js")),
    ("main.js", include_bytes!("main.js")),
    ("map.js", include_bytes!("map.js")),
    ("panel.js", include_bytes!("panel.js")),
    ("prompt.js", include_bytes!("prompt.js")),
    ("tree.js", include_bytes!("tree.js")),
];

/// The file at `path`, with or without a slash before it; "" and "/" are the page itself. None for a path of nothing.
pub fn asset(path: &str) -> Option<Asset> {
    let name = match path.strip_prefix('/').unwrap_or(path) {
        "" => "index.html",
        name => name,
    };
    let (_, bytes) = FILES.iter().find(|(known, _)| *known == name)?;
    Some(Asset { bytes, content_type: content_type(name), etag: format!("\"{:016x}\"", fnv1a(bytes)) })
}

fn content_type(name: &str) -> &'static str {
    match name.rsplit('.').next() {
        Some("html") => "text/html; charset=utf-8",
        Some("css") => "text/css; charset=utf-8",
        Some("js") => "text/javascript; charset=utf-8",
        Some("svg") => "image/svg+xml",
        _ => "application/octet-stream",
    }
}

/// The 64-bit FNV-1a hash: tells two builds apart, no more.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::Path;

    use super::*;

    fn text(name: &str) -> &'static str {
        std::str::from_utf8(asset(name).unwrap().bytes).unwrap()
    }

    /// What stands between `before` and the next quote, everywhere in `source`.
    fn quoted<'a>(source: &'a str, before: &str) -> Vec<&'a str> {
        source.split(before).skip(1).map(|rest| rest.split('"').next().unwrap()).collect()
    }

    #[test]
    fn every_file_that_the_page_names_is_served_and_no_other() {
        let (mut reached, mut open) = (BTreeSet::new(), vec!["index.html"]);
        while let Some(name) = open.pop() {
            if !reached.insert(name) {
                continue;
            }
            let source = text(name);
            if name.ends_with(".html") {
                open.extend(quoted(source, "href=\""));
                open.extend(quoted(source, "src=\""));
            }
            for module in quoted(source, "from \"") {
                open.push(module.strip_prefix("./").expect("modules are named from where they are"));
            }
        }
        assert_eq!(reached, FILES.iter().map(|(name, _)| *name).collect());
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/page");
        let on_disk =
            fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        assert_eq!(on_disk.filter(|name| name != "mod.rs").count(), FILES.len(), "files that are not served");
    }

    #[test]
    fn the_page_is_at_the_root_and_nothing_is_elsewhere() {
        assert_eq!(asset("/"), asset("index.html"));
        assert_eq!(asset(""), asset("/index.html"));
        for nothing in ["mod.rs", "page/style.css", "../lib.rs", "//", "v1/models", "STYLE.CSS"] {
            assert_eq!(asset(nothing), None, "{nothing}");
        }
    }

    #[test]
    fn files_have_types_and_tags_of_their_own() {
        let tags: BTreeSet<String> = FILES.iter().map(|(name, _)| asset(name).unwrap().etag).collect();
        assert_eq!(tags.len(), FILES.len());
        assert!(
            tags.iter().all(|tag| tag.len() == 18 && tag.starts_with('"') && tag.ends_with('"')),
            "{tags:?}"
        );
        assert_eq!(asset("main.js").unwrap().content_type, "text/javascript; charset=utf-8");
        for (name, _) in FILES {
            assert_ne!(content_type(name), "application/octet-stream", "{name}");
        }
        assert_eq!(fnv1a(b"a"), 0xaf63_dc4c_8601_ec8c);
    }

    #[test]
    fn the_page_is_small_and_keeps_to_its_policy() {
        let total: usize = FILES.iter().map(|(_, bytes)| bytes.len()).sum();
        assert!(total < 150_000, "{total} bytes");
        for (name, _) in FILES {
            let source = text(name);
            let mut never =
                vec!["@import", "innerHTML", "outerHTML", "insertAdjacentHTML", "eval(", "new Function"];
            // The name of SVG is an address that nothing asks for.
            never.extend(if name.ends_with(".svg") { [].as_slice() } else { &["http:", "https:", "url("] });
            never.extend(if name.ends_with(".html") {
                ["style=", "<style", " onclick", "javascript:"].as_slice()
            } else {
                &[]
            });
            for outside in never {
                assert!(!source.contains(outside), "{name}: {outside}");
            }
            assert!(source.lines().count() < 550, "{name}: {} lines", source.lines().count());
        }
        let scripts = text("index.html").matches("<script").count();
        assert_eq!(
            scripts,
            text("index.html").matches("<script type=\"module\" src=").count(),
            "none inline"
        );
    }
}
