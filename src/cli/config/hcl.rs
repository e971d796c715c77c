//! Reads the parts of an HCL file that are known without a server: blocks, and values that depend only on the file and
//! on the command line.

use hcl::{
    Block, Body, Expression, Map, Structure, Value,
    eval::{Context, Evaluate as _},
};
use serde_json::Value as Json;

/// Returns the scope of a job file: its variables with the values in `given`, else with their defaults, and the locals
/// made of them. Nomad's functions are not known, nor the values that Nomad fills in on a node.
pub(crate) fn scope(body: &Body, given: &[(String, String)]) -> Context<'static> {
    let mut scope = Context::new();
    let mut variables = Map::new();
    for variable in blocks(body, "variable") {
        let Some(name) = label(variable) else { continue };
        let from_command_line = given.iter().rev().find(|(given, _)| given == name);
        let value = match from_command_line {
            Some((_, text)) => Some(variable_value(variable.body(), text)),
            None => attribute(variable.body(), "default").and_then(|default| default.evaluate(&scope).ok()),
        };
        variables.extend(value.map(|value| (name.to_owned(), value)));
    }
    scope.declare_var("var", Value::Object(variables));
    let mut locals = Map::new();
    let all: Vec<_> = blocks(body, "locals").flat_map(|block| block.body().attributes()).collect();
    // Locals may refer to each other in any order, so this repeats until no further local becomes known.
    loop {
        scope.declare_var("local", Value::Object(locals.clone()));
        let before = locals.len();
        let known = all.iter().filter_map(|local| Some((local.key().to_owned(), local.expr().evaluate(&scope).ok()?)));
        locals = known.collect();
        if locals.len() == before {
            return scope;
        }
    }
}

/// Reads a variable's value from the command line: as text if the variable is a string, else as an expression.
fn variable_value(variable: &Body, text: &str) -> Value {
    let is_text = attribute(variable, "type").is_some_and(|kind| kind.to_string() == "string");
    let value = text.parse::<Expression>().ok().filter(|_| !is_text);
    value.and_then(|value| value.evaluate(&Context::new()).ok()).unwrap_or_else(|| Value::from(text))
}

/// A block's content in the form of HCL's JSON syntax.
#[derive(Debug, Default)]
pub(crate) struct Content {
    /// The attributes and blocks whose values are known.
    pub known: serde_json::Map<String, Json>,
    /// The names of the attributes and blocks whose values are not known. A nested block with an unknown value is left
    /// out as a whole, because a part of it would be reported as faulty.
    pub unknown: Vec<String>,
}

impl Content {
    /// Reads a block's body.
    pub(crate) fn of(body: &Body, scope: &Context<'_>) -> Self {
        let mut content = Self::default();
        for structure in body {
            match structure {
                Structure::Attribute(attribute) => match json(attribute.expr(), scope) {
                    Some(value) => content.add(attribute.key(), false, value),
                    None => content.unknown.push(attribute.key().to_owned()),
                },
                Structure::Block(block) if block.identifier() == "dynamic" => {
                    content.unknown.extend(label(block).map(str::to_owned));
                }
                Structure::Block(block) => {
                    let name = block.identifier();
                    let inner = Self::of(block.body(), scope);
                    if inner.unknown.is_empty() {
                        let labelled = |value, label: &hcl::BlockLabel| Json::from_iter([(label.as_str(), value)]);
                        let value = block.labels().iter().rev().fold(Json::Object(inner.known), labelled);
                        content.add(name, !block.labels().is_empty(), value);
                    }
                    content.unknown.extend(inner.unknown.iter().map(|inner| format!("{name}.{inner}")));
                }
            }
        }
        content
    }

    /// Adds a value. Several blocks of one name make a list; those with labels make one object with all labels.
    fn add(&mut self, name: &str, labelled: bool, value: Json) {
        let value = match (self.known.remove(name), value) {
            (None, value) => value,
            (Some(Json::Object(mut one)), Json::Object(other))
                if labelled && other.keys().all(|label| !one.contains_key(label)) =>
            {
                one.extend(other);
                Json::Object(one)
            }
            (Some(Json::Array(mut list)), value) => {
                list.push(value);
                Json::Array(list)
            }
            (Some(one), other) => Json::Array(vec![one, other]),
        };
        self.known.insert(name.to_owned(), value);
    }
}

/// Evaluates an expression; `None` if its value is not known here.
pub(crate) fn json(expression: &Expression, scope: &Context<'_>) -> Option<Json> {
    serde_json::to_value(expression.evaluate(scope).ok()?).ok()
}

/// Returns the expression of an attribute.
pub(crate) fn attribute<'a>(body: &'a Body, name: &str) -> Option<&'a Expression> {
    body.attributes().find(|attribute| attribute.key() == name).map(hcl::Attribute::expr)
}

/// Returns the blocks of a kind.
pub(crate) fn blocks<'a>(body: &'a Body, kind: &'a str) -> impl Iterator<Item = &'a Block> {
    body.blocks().filter(move |block| block.identifier() == kind)
}

/// Returns the labels and bodies of the blocks of a kind, including those that a `dynamic` block makes.
pub(crate) fn labelled_blocks<'a>(body: &'a Body, kind: &'a str) -> impl Iterator<Item = (&'a str, &'a Body)> {
    let made = blocks(body, "dynamic").filter(move |block| label(block) == Some(kind));
    let made = made.flat_map(|block| blocks(block.body(), "content")).map(|content| ("dynamic", content.body()));
    blocks(body, kind).map(|block| (label(block).unwrap_or_default(), block.body())).chain(made)
}

/// Returns a block's first label.
pub(crate) fn label(block: &Block) -> Option<&str> {
    block.labels().first().map(hcl::BlockLabel::as_str)
}
