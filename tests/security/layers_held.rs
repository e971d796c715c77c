//! Layers of an image that try to leave the image: names, links, pax records, whiteouts and attributes take effect
//! inside the image's own root only, or the image is refused.

use tar::EntryType;

use serde_json::json;

use crate::{
    decoy::{Decoy, SECRET},
    probe::{Outcome, outcome},
    support::{Entry, Env, Image, Layer, Packing, services},
};

/// A task of each image looks for the decoy's secret, by every path that one of the layers may have made.
const LOOK: &str = "cat /secret /h /l/secret /l /r/secret /r/data/file /x 2>/dev/null; find / -xdev -name 'made*' 2>/dev/null; echo looked";

/// An entry of a kind that `Entry`'s own constructors do not make.
fn entry(kind: EntryType, path: &str, link: &str) -> Entry {
    Entry { kind, path: path.into(), link: link.into(), content: Vec::new(), mode: 0o777, owner: 0 }
}

/// An extended header whose records apply to the next entry (POSIX.1-2001, pax).
fn pax(records: &[(&str, &str)]) -> Entry {
    Entry { content: records_of(records), ..entry(EntryType::XHeader, "pax", "") }
}

fn records_of(records: &[(&str, &str)]) -> Vec<u8> {
    let record = |(key, value): &(&str, &str)| {
        let rest = key.len() + value.len() + 3;
        // The length of a record includes the digits of the length itself.
        let length = (1..6).map(|digits| rest + digits).find(|length| length.to_string().len() == length - rest);
        format!("{} {key}={value}\n", length.unwrap())
    };
    records.iter().map(record).collect::<String>().into_bytes()
}

/// Images that are refused while the layer is downloaded: containerd never sees the layer.
fn climbing(decoy: &str) -> Vec<(&'static str, Vec<Entry>)> {
    let out = format!("{}{}", "../".repeat(12), decoy.trim_start_matches('/'));
    let (made, secret) = (format!("{out}/made"), format!("{out}/secret"));
    let file = |path: &str| Entry::file(path, "written by an image\n");
    let long = |kind: u8| Entry { content: made.clone().into(), ..entry(EntryType::new(kind), "././@LongLink", "") };
    let sparse = [("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"), ("GNU.sparse.realsize", "0")];
    let map = Entry { content: [b"0\n".to_vec(), vec![0; 510]].concat(), ..file("made") };
    vec![
        ("parents", vec![file(&made)]),
        ("parents-below", vec![Entry::dir("a"), file(&format!("a/../{made}"))]),
        ("parents-dot", vec![file(&format!("./{made}"))]),
        ("parents-absolute", vec![file(&format!("/{made}"))]),
        ("parents-directory", vec![Entry::dir(&format!("{out}/logs"))]),
        ("parents-device", vec![entry(EntryType::Char, &made, "")]),
        ("parents-link", vec![entry(EntryType::Link, "h", &secret)]),
        ("parents-whiteout", vec![file(&format!("{out}/.wh.secret"))]),
        ("parents-opaque", vec![file(&format!("{out}/.wh..wh..opq"))]),
        ("gnu-name", vec![long(b'L'), file("made")]),
        ("gnu-link", vec![long(b'K'), entry(EntryType::Link, "h", "bin/busybox")]),
        ("pax-path", vec![pax(&[("path", &made)]), file("made")]),
        ("pax-path-second", vec![pax(&[("path", "made"), ("path", &made)]), file("made")]),
        ("pax-path-lines", vec![pax(&[("path", &format!("{made}\nx"))]), file("made")]),
        ("pax-path-nul", vec![pax(&[("path", &format!("made\0/{made}"))]), file("made")]),
        ("pax-sparse-name", vec![pax(&[&sparse[..], &[("GNU.sparse.name", &made)]].concat()), map]),
        ("pax-linkpath", vec![pax(&[("linkpath", &secret)]), entry(EntryType::Link, "h", "bin/busybox")]),
        (
            "pax-linkpath-second",
            vec![
                pax(&[("linkpath", "bin/busybox"), ("linkpath", &secret)]),
                entry(EntryType::Link, "h", "bin/busybox"),
            ],
        ),
    ]
}

/// Images that are refused at some point, or whose entries lie inside the image's root.
fn contained(decoy: &str) -> Vec<(&'static str, Vec<Entry>)> {
    let out = format!("{}{}", "../".repeat(12), decoy.trim_start_matches('/'));
    let at = |name: &str| format!("{decoy}/{name}");
    let file = |path: &str| Entry::file(path, "written by an image\n");
    let link = |path: &str, target: &str| entry(EntryType::Link, path, target);
    let xattr = |name: &str, value: &str| pax(&[(&format!("SCHILY.xattr.{name}"), value)]);
    let metacopy =
        [("SCHILY.xattr.trusted.overlay.metacopy", ""), ("SCHILY.xattr.trusted.overlay.redirect", &at("secret"))];
    let global = Entry { content: records_of(&[("path", &at("made"))]), ..entry(EntryType::XGlobalHeader, "g", "") };
    vec![
        ("absolute", vec![file(&at("made"))]),
        ("root", vec![Entry { mode: 0o7777, ..Entry::dir("/") }, Entry { mode: 0o7777, ..Entry::dir("./") }]),
        ("link-absolute", vec![link("h", &at("secret"))]),
        ("link-magic", vec![link("h", &format!("/proc/1/root{}", at("secret")))]),
        ("link-through-link", vec![Entry::symlink("l", decoy), link("h", "l/secret")]),
        ("link-through-parents", vec![Entry::symlink("l", &out), link("h", "l/secret")]),
        ("link-of-link", vec![Entry::symlink("l", &at("secret")), link("h", "l"), file("h")]),
        ("link-to-root", vec![link("h", "/"), link("x", ".")]),
        ("through-link", vec![Entry::symlink("l", decoy), file("l/made")]),
        ("through-parents", vec![Entry::symlink("l", &out), file("l/made")]),
        ("through-two", vec![Entry::symlink("k", decoy), Entry::symlink("l", "k"), file("l/data/made")]),
        ("over-link", vec![Entry::symlink("secret", &at("secret")), file("secret")]),
        ("directory-over-link", vec![Entry::symlink("l", decoy), Entry { mode: 0o777, ..Entry::dir("l") }]),
        ("device-through-link", vec![Entry::symlink("l", decoy), entry(EntryType::Char, "l/made", "")]),
        ("pax-twice", vec![pax(&[("path", &at("made"))]), pax(&[("mtime", "1")]), file("made")]),
        ("pax-size", vec![pax(&[("size", "1152921504606846976")]), file("made")]),
        ("pax-size-negative", vec![pax(&[("size", "-512")]), file("made")]),
        ("pax-sizes", vec![pax(&[("size", "0"), ("size", "512")]), file("made")]),
        ("pax-global", vec![global, file("made")]),
        ("whiteout-nothing", vec![file(".wh.")]),
        ("whiteout-itself", vec![file(".wh..")]),
        ("whiteout-parent", vec![file(".wh...")]),
        ("whiteout-parent-below", vec![Entry::dir("a"), file("a/.wh...")]),
        ("whiteout-through-link", vec![Entry::symlink("l", decoy), file("l/.wh.secret")]),
        ("whiteout-device", vec![entry(EntryType::Char, "bin/cat", "")]),
        ("opaque-through-link", vec![Entry::symlink("l", decoy), file("l/.wh..wh..opq")]),
        ("opaque-plnk", vec![Entry::dir(".wh..wh.plnk"), file(".wh..wh.plnk/1.1")]),
        ("xattr-redirect", vec![xattr("trusted.overlay.redirect", decoy), Entry::dir("r")]),
        ("xattr-redirect-parents", vec![xattr("trusted.overlay.redirect", &out), Entry::dir("r")]),
        ("xattr-opaque", vec![xattr("trusted.overlay.opaque", "y"), Entry::dir("bin")]),
        ("xattr-metacopy", vec![pax(&metacopy), file("x")]),
        ("xattr-origin", vec![xattr("trusted.overlay.origin", "\0\u{7b}\u{1d}"), file("x")]),
        ("xattr-user", vec![xattr("user.overlay.redirect", decoy), Entry::dir("r")]),
        ("xattr-libarchive", vec![pax(&[("LIBARCHIVE.xattr.trusted.overlay.redirect", "L2V0Yw")]), Entry::dir("r")]),
        ("xattr-capability", vec![xattr("security.capability", "\u{1}\0\0\u{2}\u{ff}"), file("x")]),
    ]
}

/// Starts a task of each image, which is busybox with one further layer. Returns each outcome with the attack's name.
async fn outcomes(env: &mut Env, attacks: Vec<(&'static str, Vec<Entry>)>) -> Vec<(&'static str, Outcome)> {
    let mut outcomes = Vec::new();
    for (name, entries) in attacks {
        let image = Image::busybox().with_layer(Layer::new(&entries, Packing::Gzip));
        let image = image.push(&services().registry, &format!("layers/{name}:1")).await;
        let config = json!({"image": image, "command": "/bin/busybox", "args": ["sh", "-c", LOOK]});
        outcomes.push((name, outcome(env, config).await));
    }
    outcomes
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_that_climb_are_refused_before_they_are_unpacked() {
    let mut env = Env::new().await;
    let decoy = Decoy::new(&env);
    for (name, outcome) in outcomes(&mut env, climbing(decoy.path())).await {
        let Outcome::Refused(reason) = &outcome else { panic!("{name}: {outcome:?}") };
        assert!(reason.contains("escapes the image's root"), "{name}: {reason}");
    }
    decoy.assert_untouched("a layer with an entry that climbs");
    env.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_layer_makes_lies_inside_of_the_image() {
    let mut env = Env::new().await;
    let decoy = Decoy::new(&env);
    let outcomes = outcomes(&mut env, contained(decoy.path())).await;
    let mut ran = Vec::new();
    for (name, outcome) in &outcomes {
        let text = outcome.text();
        assert!(!text.contains(SECRET.trim()), "{name}: {text}");
        match outcome {
            Outcome::Refused(reason) => {
                assert!(
                    ["containerd refused Diff.Apply", "is refused"].iter().any(|part| reason.contains(part)),
                    "{name}: {text}"
                );
            }
            Outcome::Ran(..) => {
                assert!(text.contains("looked"), "{name}: {text}");
                ran.push(*name);
            }
        }
    }
    decoy.assert_untouched("a layer");
    // Control test: a file that is written through a link is in the container, at the link's target.
    assert!(ran.contains(&"through-link") && ran.contains(&"absolute"), "{ran:?}");
    // No image has harmed another one.
    let task = env.sh("echo unharmed").await;
    assert_eq!(env.finish_task(task).await.1, "unharmed\n");
    env.finish().await;
}
