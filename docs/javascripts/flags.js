// The search takes a minus in front of a word for "without": a flag typed or pasted as --max-steps would be looked for as what must not be there.
document.addEventListener("input", ({ target }) => {
  if (target.matches("[data-md-component=search-query]")) target.value = target.value.replace(/(^|\s)-+/g, "$1")
})
