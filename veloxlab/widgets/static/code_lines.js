// Lines of code, and a button that copies them.

async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = document.body.appendChild(document.createElement("textarea")); // without HTTPS there is no clipboard
  area.value = text;
  area.select();
  document.execCommand("copy");
  area.remove();
}

function render({ model, el }) {
  el.classList.add("veloxlab-code");
  const lines = el.appendChild(document.createElement("pre"));
  const button = el.appendChild(document.createElement("button"));
  button.title = "Copy these lines of code";
  let timer;
  const say = (words) => { button.textContent = words; };
  const draw = () => {
    lines.textContent = model.get("value");
    button.hidden = !model.get("value");
    say("Copy");
  };
  button.addEventListener("click", () =>
    copy(model.get("value")).then(() => say("Copied"), () => say("Not allowed")).then(() => {
      clearTimeout(timer);
      timer = setTimeout(() => say("Copy"), 1500);
    }),
  );
  draw();
  model.on("change:value", draw);
  return () => {
    clearTimeout(timer);
    model.off("change:value", draw);
  };
}

export default { render };
