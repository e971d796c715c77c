//! Converts the option tables to Nomad's schema language (hclspec).

use std::collections::HashMap;

use super::options::{OptionKind, OptionRow, Presence};
use crate::pb::hclspec::{Attr, Block, BlockList, BlockMap, Default as SpecDefault, Literal, Object, Spec, spec};

/// Returns the schema of an option table.
pub fn to_hclspec(rows: &[OptionRow]) -> Spec {
    let attributes: HashMap<String, Spec> = rows.iter().map(|row| (row.name.to_owned(), row_to_hclspec(row))).collect();
    wrap(spec::Block::Object(Object { attributes }))
}

fn row_to_hclspec(row: &OptionRow) -> Spec {
    let required = row.presence == Presence::Required;
    let name = row.name.to_owned();
    let attr = |kind: &str| spec::Block::Attr(Attr { name: name.clone(), r#type: kind.to_owned(), required });
    let primary = wrap(match row.kind {
        OptionKind::Text => attr("string"),
        OptionKind::Flag => attr("bool"),
        OptionKind::Number => attr("number"),
        OptionKind::List => attr("list(string)"),
        OptionKind::Map => attr("list(map(string))"),
        OptionKind::Block(rows) => {
            spec::Block::BlockValue(Box::new(Block { name, required, nested: Some(Box::new(to_hclspec(rows))) }))
        }
        OptionKind::Blocks(rows) => spec::Block::BlockList(Box::new(BlockList {
            name,
            min_items: u64::from(required),
            max_items: 0,
            nested: Some(Box::new(to_hclspec(rows))),
        })),
        OptionKind::Labelled(rows) => spec::Block::BlockMap(Box::new(BlockMap {
            name,
            labels: vec!["name".to_owned()],
            nested: Some(Box::new(to_hclspec(rows))),
        })),
    });
    match row.presence {
        Presence::Default(value) => wrap(spec::Block::Default(Box::new(SpecDefault {
            primary: Some(Box::new(primary)),
            default: Some(Box::new(wrap(spec::Block::Literal(Literal { value: value.to_owned() })))),
        }))),
        _ => primary,
    }
}

fn wrap(block: spec::Block) -> Spec {
    Spec { block: Some(block) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugin::options::{PLUGIN_OPTIONS, TASK_OPTIONS};

    /// Inside a `Default` the key does not imply the name, so it must be there (docs/protocol/nomad-plugin.md#2.3).
    #[test]
    fn defaulted_attributes_carry_their_names() {
        let Some(spec::Block::Object(object)) = to_hclspec(TASK_OPTIONS).block else { panic!("an object") };
        let Some(spec::Block::Default(default)) = &object.attributes["image_pull_timeout"].block else {
            panic!("a default")
        };
        let primary = default.primary.as_ref().and_then(|spec| spec.block.as_ref());
        assert!(matches!(primary, Some(spec::Block::Attr(attr)) if attr.name == "image_pull_timeout"));
        let literal = default.default.as_ref().and_then(|spec| spec.block.as_ref());
        assert!(matches!(literal, Some(spec::Block::Literal(l)) if l.value == "\"5m\""), "with its quotes");
    }

    #[test]
    fn kinds_of_the_old_driver_are_kept() {
        let Some(spec::Block::Object(object)) = to_hclspec(TASK_OPTIONS).block else { panic!("an object") };
        assert!(matches!(object.attributes["mounts"].block, Some(spec::Block::BlockList(_))));
        assert!(matches!(object.attributes["auth"].block, Some(spec::Block::BlockValue(_))));
        assert!(matches!(&object.attributes["image"].block, Some(spec::Block::Attr(a)) if a.required));
        let Some(spec::Block::Object(plugin)) = to_hclspec(PLUGIN_OPTIONS).block else { panic!("an object") };
        assert!(
            matches!(&plugin.attributes["allow_privileged"].block, Some(spec::Block::Attr(a)) if a.r#type == "bool")
        );
    }
}
