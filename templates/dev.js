// With --dev each page loads this (section "Development" of orion.py). It asks which server there is and what went wrong in it, shows
// the latter, and brings the page up to date when another server has taken the place of the one before.

const PAUSE = 500, pause = ms => new Promise(done => setTimeout(done, ms))
let known

async function look() {
  const answer = await fetch('/_dev')
  if (!answer.ok) return
  const now = await answer.json(), before = known ?? now, same = now.server === before.server
  known = now
  if (now.errors > (same ? before.errors : 0)) show(now.text)
  else if (!same) await renew()
}

// The whole page is morphed: what is typed, and where the caret is, stays. Other scripts need a page of their own, to which
// what is typed is carried.
async function renew() {
  const answer = await fetch(location.href, { headers: { accept: 'text/html' } })
  if (answer.status >= 500) return
  if (!answer.ok || answer.redirected) return location.reload()
  const elements = (await answer.text()).replace(/ data-nonce="\w*"/, '')
  if (scripts(new DOMParser().parseFromString(elements, 'text/html')) !== scripts(document)) return carry()
  box.remove()
  const detail = { type: 'datastar-patch-elements', el: document.body, argsRaw: { elements } }
  document.dispatchEvent(new CustomEvent('datastar-fetch', { detail }))
  for (const link of document.querySelectorAll('link[rel=stylesheet]')) link.href = link.href
  const live = document.getElementById('live')
  live?.replaceWith(live.cloneNode(true))        // its stream begins now, and not after a pause
}
const scripts = page => Array.from(page.querySelectorAll('script[src]'), script => script.getAttribute('src')).sort().join()

const fields = () => [...document.querySelectorAll('input:not([type=password], [type=file], [type=hidden]), textarea, select')]
function carry() {
  sessionStorage.drafts = JSON.stringify(fields().map(({ id, name, value, checked }) => ({ id, name, value, checked })))
  location.reload()
}
function take() {
  const drafts = JSON.parse(sessionStorage.drafts ?? '[]'), found = fields()
  sessionStorage.removeItem('drafts')
  drafts.forEach(({ id, name, value, checked }, at) => {
    const el = found[at]
    if (el?.id !== id || el.name !== name || (el.value === value && el.checked === checked)) return
    Object.assign(el, { value, checked })
    el.dispatchEvent(new Event('input', { bubbles: true }))                // a signal may be bound to it
  })
}

const box = document.createElement('div'), text = document.createElement('pre'), close = document.createElement('button')
box.id = 'fault'
box.setAttribute('role', 'alert')
close.textContent = 'Close'
close.onclick = () => box.remove()
box.append(text, close)
const sheet = new CSSStyleSheet()
sheet.replaceSync(`#fault { position: fixed; inset: auto 0 0; z-index: 99; max-height: 60vh; overflow: auto; padding: 1rem;
  background: #300; color: #fee; border-top: 4px solid #f55 }
  #fault pre, .fault pre { margin: 0 0 1rem; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem }
  #fault pre::first-line { font-weight: bold; font-size: 1rem }
  #fault pre { padding-inline-end: 6rem }
  #fault button { position: absolute; top: .75rem; right: .75rem }
  .fault h1 { font-size: 1.4rem; max-width: none; overflow-wrap: anywhere }`)
document.adoptedStyleSheets.push(sheet)

function show(what) {
  text.textContent = what
  document.documentElement.append(box)
}

const quietly = () => look().catch(() => {})     // there may be no server just now
document.addEventListener('datastar-fetch', ({ detail: { type } }) => type === 'error' && quietly())
document.addEventListener('keydown', ({ key }) => key === 'Escape' && box.remove())
take()
for (;;) {
  if (!document.hidden || !known) await quietly()
  await pause(PAUSE)
}
