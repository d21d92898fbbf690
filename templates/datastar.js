// The page's side of the conversation: a small client for the Datastar v1 protocol, written from its specification.
//
// A page holds *signals* (a tree of reactive values) and elements with `data-*` attributes. An attribute's text is an
// expression, `$name` in it is a signal, `@post('/url')` an *action*: a fetch that carries the signals and whose answer,
// usually a stream of server-sent events, patches elements and signals. Patched elements are *morphed*: the old nodes stay
// and only what differs is written, so focus, caret, scrolling and typed text survive whatever the server sends.
//
// One seam holds it together. Whatever arrives is announced as a `datastar-fetch` event on `document`, and the two
// patchers at the end of the file merely listen to it; a page, or a test, can dispatch such an event just as well.

// ── Signals ── Reading inside an effect subscribes it, writing wakes it, a batch lets the woken run once, at its end. ──────

const KEYS = Symbol('the keys of a branch')
const derived = new Set()                   // woken computed values: they run before ...
const queue = new Set()                     // ... the other woken effects
let running = null                          // the effect whose reads are being recorded
let depth = 0                               // open batches
let changes = {}                            // what the open batch has written

function batch(work) {
  depth++
  try {
    return work()
  } finally {
    if (depth === 1) while (derived.size + queue.size) run([...derived, ...queue][0])
    if (!--depth) announce()
  }
}

function announce() {
  const detail = changes
  changes = {}
  if (Object.keys(detail).length) document.dispatchEvent(new CustomEvent('datastar-signal-patch', { detail }))
}

function effect(work, waiting = queue) {
  const self = { work, waiting, sources: new Set() }
  batch(() => run(self))
  return () => { self.work = () => {}; forget(self) }
}

function run(self) {
  forget(self)
  try {
    recording(self, self.work)
  } catch (error) {
    reportError(error)                      // one broken effect must not stop the others
  }
}

function recording(self, work) {
  const outer = running
  running = self
  try { return work() } finally { running = outer }
}

const untracked = work => recording(null, work)

function forget(self) {
  self.waiting.delete(self)
  for (const readers of self.sources) readers.delete(self)
  self.sources.clear()
}

function track(cells, key) {
  if (!running) return
  if (!cells.has(key)) cells.set(key, new Set())
  cells.get(key).add(running)
  running.sources.add(cells.get(key))
}

function wake(cells, key) {
  for (const reader of cells.get(key) ?? []) if (reader !== running) reader.waiting.add(reader)
}

const isTree = value => Array.isArray(value) ||
  (value !== null && typeof value === 'object' && Object.getPrototypeOf(value) === Object.prototype)

// The tree is made of proxies; a Branch is the handler of one object or array in it.
class Branch {
  constructor(path) { this.path = path; this.cells = new Map() }

  static grow(tree, path = '') {
    const target = Array.isArray(tree) ? [] : {}
    for (const key of Object.keys(tree)) if (key !== '__proto__') target[key] = Branch.adopt(tree[key], path + key)
    return new Proxy(target, new Branch(path && `${path}.`))
  }

  static adopt(value, path) { return isTree(value) ? Branch.grow(value, path) : value }

  get(target, key) {
    const own = Object.hasOwn(target, key)
    if (!own && (key in target || typeof key === 'symbol' || key === 'toJSON')) return target[key]
    // A name that is read for the first time becomes a signal; one that was deleted stays away.
    if (!own && !Array.isArray(target) && !this.cells.has(key)) this.set(target, key, '')
    track(this.cells, key)
    const value = target[key]
    return value instanceof Computed ? value.read() : value ?? (Array.isArray(target) ? value : '')
  }

  set(target, key, value) {
    if (value == null && !Array.isArray(target)) return this.deleteProperty(target, key)
    const readOnly = key === '__proto__' || (target[key] instanceof Computed && !(value instanceof Computed))
    if (readOnly || (Object.hasOwn(target, key) && Object.is(target[key], value))) return true
    batch(() => {
      const { length } = target
      if (!Object.hasOwn(target, key)) wake(this.cells, KEYS)
      target[key] = Branch.adopt(value, this.path + key)
      if (Array.isArray(target) && target.length !== length) wake(this.cells, 'length')
      this.changed(key, value)
    })
    return true
  }

  deleteProperty(target, key) {
    if (Object.hasOwn(target, key)) batch(() => {
      delete target[key]
      wake(this.cells, KEYS)
      this.changed(key, null)
    })
    return true
  }

  changed(key, value) {
    wake(this.cells, key)
    if (!(value instanceof Computed)) overlay(changes, nest(this.path + key, value))
  }

  has(target, key) { track(this.cells, key); return Object.hasOwn(target, key) }

  ownKeys(target) { track(this.cells, KEYS); return Reflect.ownKeys(target) }
}

// A computed value is an effect that remembers: it runs when something it read has changed and someone looks.
class Computed {
  constructor(work) {
    this.cells = new Map()
    this.stop = effect(() => this.write(work()), derived)
  }

  write(value) {
    if (Object.is(value, this.value)) return
    this.value = value
    wake(this.cells, 'value')
  }

  read() {
    for (const stale of derived) run(stale)
    track(this.cells, 'value')
    return this.value
  }
}

const signals = Branch.grow({})

const nest = (path, value) => path.split('.').reduceRight((inner, key) => ({ [key]: inner }), value)

const lookup = path => path.split('.').reduce((branch, key) => isTree(branch) && key in branch ? branch[key] : undefined, signals)

const assign = (path, value) => mergePatch(nest(path, value))

function overlay(tree, patch) {
  for (const [key, value] of Object.entries(patch))
    isTree(value) && isTree(tree[key]) ? overlay(tree[key], value) : tree[key] = value
}

// RFC 7386: objects merge, everything else replaces, null deletes.
function mergePatch(patch, { ifMissing = false } = {}, branch = signals) {
  batch(() => {
    for (const [key, value] of Object.entries(patch)) {
      const known = Object.hasOwn(branch, key)
      if (value == null) ifMissing || delete branch[key]
      else if (!isTree(value) || Array.isArray(value)) known && ifMissing || (branch[key] = value)
      else if (known && isTree(branch[key])) mergePatch(value, { ifMissing }, branch[key])
      else if (!known || !ifMissing) { branch[key] = {}; mergePatch(value, {}, branch[key]) }
    }
  })
}

function* leaves(branch, path = '') {
  for (const [key, value] of Object.entries(branch))
    if (isTree(value) && !Array.isArray(value)) yield* leaves(value, `${path}${key}.`)
    else yield [path + key, value]
}

function filtered({ include = /.*/, exclude = /(?!)/ } = {}) {
  const tree = {}, wanted = new RegExp(include), unwanted = new RegExp(exclude)
  for (const [path, value] of leaves(signals))
    if (path.search(wanted) >= 0 && path.search(unwanted) < 0) overlay(tree, nest(path, value))
  return tree
}

// ── Expressions ── JavaScript in which `$a.b` is a signal and `@name(` an action; each distinct text is compiled once. ─────

const STRINGS = /"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|`(?:\\.|[^`\\])*`/.source
const PIECES = new RegExp(`${STRINGS}|[()[\\]{};]`, 'gs')
const NAMES = new RegExp(`${STRINGS}|(?<![\\w$])\\$(\\w+(?:[.-]\\w+)*)|@(\\w+)\\(`, 'gs')
const HOLES = /\$\{((?:[^{}]|\{[^{}]*\})*)\}/g
const compiled = new Map()
const nonce = takeNonce()

// With <html data-nonce="..."> the page needs neither 'unsafe-eval' nor 'unsafe-inline' for scripts.
function takeNonce() {
  const value = document.documentElement.getAttribute('data-nonce')
  document.documentElement.removeAttribute('data-nonce')
  if (value === '') throw new Error('data-nonce is empty')
  return value
}

function translate(code) {
  return code.replace(NAMES, (text, signal, action) => {
    if (signal) return '$' + signal.split('.').map(part => `['${part}']`).join('')
    if (action) return `__action('${action}',evt,`
    return text[0] === '`' ? text.replace(HOLES, (_, hole) => '${' + translate(hole) + '}') : text
  })
}

// The value of an expression is that of its last statement; a `;` inside brackets or strings does not end one.
function returnLast(code) {
  const text = code.replace(/[;\s]+$/, '')
  let level = 0, last = 0
  for (const { 0: piece, index } of text.matchAll(PIECES)) {
    if ('([{'.includes(piece)) level++
    else if (')]}'.includes(piece)) level--
    else if (piece === ';' && !level) last = index + 1
  }
  return `${text.slice(0, last)}\nreturn (${text.slice(last)}\n)`
}

function compile(code, returns) {
  const body = translate(returns ? returnLast(code) : code)
  if (!compiled.has(body)) compiled.set(body, nonce ? compileInline(body) : Function('el', '$', '__action', 'evt', body))
  return compiled.get(body)
}

function compileInline(body) {
  const script = liveScript({ textContent: `document.currentScript.made = function (el, $, __action, evt) {${body}\n}` })
  document.head.append(script)
  script.remove()
  if (!script.made) throw new SyntaxError('the expression does not compile')
  return script.made
}

// Scripts that came through a parser of fragments never run; a copy made by hand does, once, when it is inserted.
function liveScript({ attributes = [], textContent }) {
  const script = document.createElement('script')
  for (const { name, value } of attributes) script.setAttribute(name, value)
  if (nonce) script.nonce = nonce
  script.textContent = textContent
  return script
}

// ── Attributes ── `data-<plugin>[:<key>][__<modifier>[.<arg>]]`: found by a walk at the start, then by one observer. ────────

const applied = new WeakMap()               // element -> Map of attribute name -> Attribute

class Attribute {
  constructor(el, name, value) {
    Object.assign(this, { el, name, value, ...parsed(name), endings: new Set() })
    this.action = (action, evt, ...args) => perform(this, action, evt, args)
  }

  start() {
    if (misused(this.plugin.needs, this.key, this.value)) throw this.explained(new Error('key or value missing, or one too many'))
    this.plugin.apply(this)
  }

  compute(evt) {
    try {
      this.code ??= compile(this.value, this.plugin.returns)
      return this.code.call(this.el, this.el, signals, this.action, evt)
    } catch (error) {
      throw this.explained(error)
    }
  }

  // Computes a value, writes it whenever it changes, and again when a patch has overwritten what this attribute owns.
  own(write, compute = () => this.compute()) {
    let value
    this.reassert = () => write(value)
    this.endings.add(effect(() => write(value = compute())))
  }

  listen(target, type, listener, options) {
    target.addEventListener(type, listener, options)
    this.endings.add(() => target.removeEventListener(type, listener, options))
  }

  cased(fallback) { return cases[this.mods.get('case')?.[0] ?? fallback](this.key) }

  // The signal that is named by the key (in kebab case, because HTML has no capitals) or, literally, by the value.
  signalName() { return this.key ? this.cased('camel') : this.value.trim() }

  // `data-class:key="value"` and `data-class="{key: value}"` say the same.
  pairs(value, fallback) { return this.key ? [[this.cased(fallback), value]] : Object.entries(value ?? {}) }

  end() { for (const ending of this.endings) ending() }

  explained(error) {
    const { el, name, value } = this
    return new error.constructor(`${error.message}, in ${name}="${value}" of <${el.localName} id="${el.id}">`, { cause: error })
  }
}

const cases = {
  kebab: key => key,
  camel: key => key.replace(/-(\w)/g, (_, letter) => letter.toUpperCase()),
  snake: key => key.replaceAll('-', '_'),
  pascal: key => cases.camel(`-${key}`),
}

const names = new Map()

function parsed(name) {
  if (!names.has(name)) {
    const [head, ...mods] = name.slice('data-'.length).split('__')
    const [, plugin, key] = /^([^:]*):?(.*)$/s.exec(head)
    names.set(name, {
      plugin: Object.hasOwn(plugins, plugin) ? plugins[plugin] : undefined,
      key,
      mods: new Map(mods.map(mod => mod.split('.')).map(([mod, ...args]) => [mod, args])),
    })
  }
  return names.get(name)
}

// A plugin says what it needs as two letters, for key and value: ! required, - refused, ? optional; xx: exactly one.
function misused([keyRule, valueRule], key, value) {
  if (keyRule === 'x') return Boolean(key) === Boolean(value)
  return [[keyRule, key], [valueRule, value]].some(([rule, part]) => rule === '!' ? !part : rule === '-' && part)
}

function applyAttribute(el, name) {
  const value = el.getAttribute(name), known = applied.get(el)?.get(name)
  if (known?.value === value || !(known || parsed(name).plugin)) return
  known?.end()
  applied.get(el)?.delete(name)
  if (value === null) return
  const attribute = new Attribute(el, name, value)
  if (!applied.has(el)) applied.set(el, new Map())
  applied.get(el).set(name, attribute)
  try {
    attribute.start()
  } catch (error) {
    reportError(error)                      // one broken attribute must not stop the walk
  }
}

function applyTree(node) {
  if (node.nodeType !== Node.ELEMENT_NODE || node.hasAttribute('data-ignore')) return
  if (!node.hasAttribute('data-ignore__self'))
    for (const name of node.getAttributeNames()) if (name.startsWith('data-')) applyAttribute(node, name)
  for (const child of [...node.children]) applyTree(child)
}

function endTree(node) {
  if (node.nodeType !== Node.ELEMENT_NODE) return
  for (const el of [node, ...node.querySelectorAll('*')]) {
    applied.get(el)?.forEach(attribute => attribute.end())
    applied.delete(el)
  }
}

// A moved element counts as removed and added: its attributes end and start again.
function observe(records) {
  const added = new Set(), touched = new Set()
  for (const { target, addedNodes, removedNodes } of records) {
    removedNodes.forEach(endTree)
    addedNodes.forEach(node => added.add(node))
    touched.add(target.nodeType === Node.TEXT_NODE ? target.parentElement : target)
  }
  batch(() => {
    for (const node of added) if (node.isConnected && !node.parentElement?.closest('[data-ignore]')) applyTree(node)
    for (const { type, target, attributeName } of records)
      if (type === 'attributes' && attributeName.startsWith('data-') && target.isConnected && !target.closest('[data-ignore]'))
        applyAttribute(target, attributeName)
    for (const el of touched) applied.get(el)?.forEach(attribute => attribute.reassert?.())
  })
}

// ── Plugins ── What each attribute does. ────────────────────────────────────────────────────────────────────────────────

const plugins = {
  signals: {
    needs: '??', returns: true,
    apply(a) {
      const value = a.value ? a.compute() : a.key ? '' : {}
      mergePatch(a.key ? nest(a.signalName(), value) : value, { ifMissing: a.mods.has('ifmissing') })
    },
  },
  computed: {
    needs: '?!', returns: true,
    apply(a) {
      const works = a.key ? [[a.signalName(), () => a.compute()]] : leaves(a.compute())
      for (const [path, work] of works) {
        const computed = new Computed(work)
        assign(path, computed)
        a.endings.add(computed.stop)
      }
    },
  },
  text: {
    needs: '-!', returns: true,
    apply: a => a.own(value => {
      const text = String(value ?? '')
      if (a.el.textContent !== text) a.el.textContent = text
    }),
  },
  show: {
    needs: '-!', returns: true,
    apply: a => a.own(value => {
      const { style } = a.el
      if (Boolean(value) === (style.display !== 'none')) return
      value ? style.removeProperty('display') : style.setProperty('display', 'none')
    }),
  },
  class: {
    needs: '?!', returns: true,
    apply(a) {
      const set = ([list, wanted]) => {
        for (const name of list.split(/\s+/).filter(Boolean))
          if (a.el.classList.contains(name) !== Boolean(wanted)) a.el.classList.toggle(name)
      }
      let pairs = []
      a.own(value => (pairs = a.pairs(value, 'kebab')).forEach(set))
      a.endings.add(() => pairs.forEach(([list]) => set([list, false])))
    },
  },
  attr: {
    needs: '?!', returns: true,
    apply: a => a.own(value => a.pairs(value, 'kebab').forEach(([name, wanted]) => setAttribute(a.el, name, wanted))),
  },
  style: {
    needs: '?!', returns: true,
    apply(a) {
      const { style } = a.el, originals = {}
      const set = (name, value) => style.getPropertyValue(name) === value || style.setProperty(name, value)
      a.own(value => a.pairs(value, 'kebab').forEach(([key, wanted]) => {
        const name = key.replace(/[A-Z]/g, letter => `-${letter.toLowerCase()}`)
        originals[name] ??= style.getPropertyValue(name)
        set(name, wanted || wanted === 0 ? String(wanted) : originals[name])
      }))
      a.endings.add(() => Object.entries(originals).forEach(pair => set(...pair)))
    },
  },
  bind: { needs: 'xx', apply: bind },
  on: { needs: '!!', apply: listenTo },
  init: { needs: '-!', apply: a => timed(() => batch(() => a.compute()), a.mods)() },
  effect: { needs: '-!', apply: a => a.endings.add(effect(() => a.compute())) },
  indicator: {
    needs: 'xx',
    apply(a) {
      const name = a.signalName(), steps = { started: 1, finished: -1 }
      let count = 0
      assign(name, false)
      a.endings.add(() => assign(name, false))
      a.listen(document, 'datastar-fetch', ({ detail: { type, el } }) => {
        if (el === a.el && type in steps) assign(name, (count += steps[type]) > 0)
      })
    },
  },
  ref: { needs: 'xx', apply: a => assign(a.signalName(), a.el) },
  'on-interval': {
    needs: '-!',
    apply(a) {
      const tags = a.mods.get('duration') ?? ['1s'], work = timed(() => batch(() => a.compute()), a.mods)
      const timer = setInterval(work, milliseconds(tags))
      a.endings.add(() => clearInterval(timer))
      if (tags.includes('leading')) work()
    },
  },
  'json-signals': {
    needs: '-?', returns: true,
    apply: a => a.own(text => { if (a.el.textContent !== text) a.el.textContent = text },
      () => JSON.stringify(filtered(a.value ? a.compute() : {}), null, a.mods.has('terse') ? 0 : 2)),
  },
}

function setAttribute(el, name, value) {
  if (value === false || value == null) return el.removeAttribute(name)
  const text = value === true ? '' : typeof value === 'string' ? value : JSON.stringify(value)
  if (el.getAttribute(name) !== text) el.setAttribute(name, text)
}

function listenTo(a) {
  const { el, mods } = a, type = a.cased('kebab')
  const ours = ['datastar-fetch', 'datastar-signal-patch'].includes(type)
  const target = mods.has('window') ? window : mods.has('document') || mods.has('outside') || ours ? document : el
  const work = timed(evt => batch(() => a.compute(evt)), mods)
  const listener = evt => {
    if (mods.has('outside') && el.contains(evt.target)) return
    if (mods.has('prevent') || (type === 'submit' && el instanceof HTMLFormElement)) evt.preventDefault()
    if (mods.has('stop')) evt.stopPropagation()
    work(evt)
  }
  const options = Object.fromEntries(['once', 'passive', 'capture'].map(name => [name, mods.has(name)]))
  a.listen(target, type, listener, options)
}

function milliseconds([time]) {
  const [, number, unit] = /^(\d+)(ms|s)?$/.exec(time) ?? [0, 0]
  return number * (unit === 's' ? 1000 : 1)
}

// The modifiers that say when: each wraps the work, in this order.
const timings = {
  delay: (work, wait) => (...args) => { setTimeout(work, wait, ...args) },
  debounce(work, wait, tags) {
    let timer
    return (...args) => {
      if (tags.includes('leading') && !timer) work(...args)
      clearTimeout(timer)
      timer = setTimeout(() => {
        timer = undefined
        if (!tags.includes('notrailing')) work(...args)
      }, wait)
    }
  },
  throttle(work, wait, tags) {
    let busy = false, last
    return (...args) => {
      last = args
      if (busy) return
      busy = true
      if (!tags.includes('noleading')) { last = undefined; work(...args) }
      setTimeout(() => {
        busy = false
        if (tags.includes('trailing') && last) work(...last)
      }, wait)
    }
  },
  viewtransition: work => (...args) => transition(() => work(...args)),
}

function timed(work, mods) {
  return Object.entries(timings).filter(([name]) => mods.has(name))
    .reduce((inner, [name, wrap]) => wrap(inner, milliseconds(mods.get(name)), mods.get(name)), work)
}

const transition = work => document.startViewTransition ? document.startViewTransition(work) : work()

// ── Two-way binding ── How each kind of control is read (in the type its signal already has) and written. ────────────────

const asString = (el, now) => typeof now === 'string' || now === undefined ? el.value : Number(el.value)
const asNumber = (el, now) => typeof now === 'string' ? el.value : Number(el.value)
const setValue = (el, value) => { el.value = value ?? '' }

const controls = [
  ['[type=checkbox]', {
    read: (el, now) => typeof now === 'boolean' || (now === undefined && !el.hasAttribute('value')) ? el.checked : el.checked ? el.value : '',
    write: (el, value) => { el.checked = typeof value === 'string' ? value === el.value : Boolean(value) },
  }],
  ['[type=radio]', {
    read: (el, now) => el.checked ? asString(el, now) : now,
    write: (el, value) => { el.checked = String(value) === el.value },
  }],
  ['[type=number], [type=range]', { read: asNumber, write: setValue }],
  ['select[multiple]', {
    read: el => Array.from(el.selectedOptions, option => option.value),
    write(el, value) { for (const option of el.options) option.selected = [value].flat().map(String).includes(option.value) },
  }],
  ['input, select, textarea', { read: asString, write: setValue }],
  ['*', {
    read: el => 'value' in el ? el.value : el.getAttribute('value'),
    write(el, value) { 'value' in el ? setValue(el, value) : setAttribute(el, 'value', value) },
  }],
]

function bind(a) {
  const { el } = a, name = a.signalName()
  const { read, write } = controls.find(([selector]) => el.matches(selector))[1]
  const pull = () => assign(name, read(el, untracked(() => lookup(name))))
  if (el.type === 'radio' && !el.name) el.name = name
  if (lookup(name) === undefined) pull()
  let fresh = true
  a.own(value => {
    // A control that says the same in other characters (an empty number for 0) is left to the user.
    if (fresh || !Object.is(read(el, value), value)) write(el, value)
    fresh = false
  }, () => lookup(name))
  for (const type of ['input', 'change', 'datastar-prop-change']) a.listen(el, type, pull)
}

// ── Actions ── What `@name(...)` does. ──────────────────────────────────────────────────────────────────────────────────

const actions = {
  peek: (a, evt, work) => untracked(work),
  setAll: (a, evt, value, filter) => changeAll(filter, () => value),
  toggleAll: (a, evt, filter) => changeAll(filter, value => !value),
}
for (const method of ['get', 'post', 'put', 'patch', 'delete', 'query'])
  actions[method] = (a, evt, url, options) => untracked(() => request(a, evt, method.toUpperCase(), url, options))

function perform(attribute, action, evt, args) {
  if (!Object.hasOwn(actions, action)) throw new Error(`there is no action @${action}`)
  return actions[action](attribute, evt, ...args)
}

const changeAll = (filter, change) => untracked(() => {
  const every = Object.entries(Object.fromEntries(leaves(filtered(filter))))
  batch(() => { for (const [path, value] of every) assign(path, change(value)) })
})

// ── Requests ── One call is one or more attempts; what is tried again after what is a table. ─────────────────────────────

const calls = new Map()                     // 'GET /live' -> the AbortController of the call that is open
const AGAIN = {
  auto: ['broken'], error: ['broken', 'refused'], always: ['broken', 'refused', 'ended'], never: [],
}
const DEFAULTS = {
  contentType: 'json', headers: {}, filterSignals: { exclude: /(^|\.)_/ }, requestCancellation: 'auto',
  retry: 'auto', retryInterval: 1000, retryScaler: 2, retryMaxWait: 30_000, retryMaxCount: 10,
}

const emit = (type, el, argsRaw = {}) =>
  document.dispatchEvent(new CustomEvent('datastar-fetch', { detail: { type, el, argsRaw } }))

async function request(attribute, evt, method, url, options = {}) {
  const settings = { ...DEFAULTS, openWhenHidden: method !== 'GET', ...options }
  const abort = claim(attribute, `${method} ${url}`, settings.requestCancellation)
  const call = { ...settings, el: attribute.el, method, url, signal: abort.signal, tries: 0, wait: settings.retryInterval, lastEventId: '' }
  emit('started', call.el)
  try {
    if (call.contentType === 'form' && !readForm(call, evt)) return
    await attempts(call)
  } catch (error) {
    if (!call.signal.aborted) throw error
  } finally {
    if (calls.get(`${method} ${url}`) === abort) calls.delete(`${method} ${url}`)
    emit('finished', call.el)
  }
}

// A new call aborts an unfinished one of the same method and URL, whichever element made it.
function claim(attribute, name, cancellation) {
  if (cancellation instanceof AbortController) return cancellation
  const abort = new AbortController()
  if (cancellation !== 'disabled') {
    calls.get(name)?.abort()
    calls.set(name, abort)
  }
  if (cancellation === 'cleanup') attribute.endings.add(() => abort.abort())
  return abort
}

// Takes the fields of the form as they are now; false if the form is not valid, and then the browser says so.
function readForm(call, evt) {
  const form = call.selector ? document.querySelector(call.selector) : call.el.closest('form')
  if (!form) throw new Error('a request with contentType "form" found no form')
  const button = [evt?.submitter, call.el].find(el => el?.form === form && ['submit', 'image'].includes(el.type))
  if (button && evt?.type === 'click') evt.preventDefault()                 // we send the form, the browser need not
  if (!form.noValidate && !form.reportValidity()) return false
  call.fields = new FormData(form, button)
  call.multipart = form.enctype === 'multipart/form-data'
  return true
}

async function attempts(call) {
  for (;;) {
    const outcome = await attempt(call)
    if (!AGAIN[call.retry].includes(outcome)) return
    if (call.tries++ >= call.retryMaxCount) break
    emit('retrying', call.el)
    await pause(call.wait * (0.8 + Math.random() * 0.4), call.signal)        // not all pages at the same moment
    call.wait = Math.min(call.wait * call.retryScaler, call.retryMaxWait)
  }
  emit('retries-failed', call.el)
  throw Object.assign(new Error(`${call.method} ${call.url} failed ${call.tries} times`), { name: 'FetchFailed' })
}

function pause(wait, signal) {
  return new Promise((resolve, reject) => {
    setTimeout(resolve, wait)
    signal.addEventListener('abort', reject, { once: true })
  })
}

// One fetch. Unless told otherwise a hidden page has none: it is aborted, and sent anew when the page is looked at.
async function attempt(call) {
  if (!call.openWhenHidden) await shown(call.signal)
  const hidden = new AbortController()
  const hide = () => document.hidden && !call.openWhenHidden && hidden.abort()
  document.addEventListener('visibilitychange', hide)
  const [url, init] = prepare(call)
  try {
    return await receive(call, await fetch(url, { ...init, signal: AbortSignal.any([call.signal, hidden.signal]) }))
  } catch (error) {
    if (call.signal.aborted) throw error
    return hidden.signal.aborted ? attempt(call) : 'broken'
  } finally {
    document.removeEventListener('visibilitychange', hide)
  }
}

function shown(signal) {
  if (!document.hidden) return
  return new Promise((resolve, reject) => {
    document.addEventListener('visibilitychange', () => document.hidden || resolve(), { signal })
    signal.addEventListener('abort', reject, { once: true })
  })
}

function prepare(call) {
  const { method, fields } = call, inQuery = ['GET', 'DELETE'].includes(method)
  const url = new URL(call.url, document.baseURI)
  const headers = new Headers({ Accept: 'text/event-stream, text/html, application/json', 'Datastar-Request': 'true' })
  let body
  if (fields && inQuery) fields.forEach((value, name) => url.searchParams.append(name, value.name ?? value))
  else if (fields) body = call.multipart ? fields : new URLSearchParams(fields)
  else {
    body = JSON.stringify(call.payload ?? filtered(call.filterSignals))
    if (inQuery) url.searchParams.set('datastar', body)
    else headers.set('Content-Type', 'application/json')
  }
  if (call.lastEventId) headers.set('last-event-id', call.lastEventId)
  for (const [name, value] of Object.entries(call.headers)) headers.set(name, value)
  return [url, { method, headers, body: inQuery ? undefined : body }]
}

// Only a 200 is applied. 204, 304 and the like say that it is over; the others that the server will not.
async function receive(call, response) {
  const { status, headers } = response
  if (status === 204 || (status >= 300 && status < 400)) return 'over'
  if (status >= 400) emit('error', call.el, { status: String(status) })
  if (status !== 200) return status >= 400 ? 'refused' : 'ended'
  call.tries = 0
  call.wait = call.retryInterval
  const type = headers.get('content-type') ?? ''
  const answer = Object.keys(answers).find(each => type.includes(each))
  await (answer ? answers[answer](call, await response.text(), headers) : readEvents(call, response.body))
  return 'ended'
}

const answers = {
  'text/html': (call, elements, headers) =>
    emit('datastar-patch-elements', call.el, { elements, ...steering(headers, 'selector', 'mode', 'namespace', 'useViewTransition') }),
  'application/json': (call, text, headers) =>
    emit('datastar-patch-signals', call.el, { signals: text, ...steering(headers, 'onlyIfMissing') }),
  'text/javascript'(call, textContent, headers) {
    const attributes = Object.entries(JSON.parse(headers.get('datastar-script-attributes') ?? '{}'))
    document.head.append(liveScript({ attributes: attributes.map(([name, value]) => ({ name, value })), textContent }))
  },
}

// The data keys that an answer without events carries in headers: useViewTransition as datastar-use-view-transition.
function steering(headers, ...keys) {
  const header = key => headers.get('datastar-' + key.replace(/[A-Z]/g, letter => `-${letter.toLowerCase()}`))
  return Object.fromEntries(keys.map(key => [key, header(key)]).filter(([, value]) => value !== null))
}

async function readEvents(call, body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader()
  const feed = lines(fields(call))
  for (let chunk; !(chunk = await reader.read()).done;) feed(chunk.value)
}

// LF, CRLF and a bare CR end a line, also when a chunk ends between CR and LF.
function lines(take) {
  let rest = '', afterCR = false
  return chunk => {
    const found = (afterCR && chunk[0] === '\n' ? chunk.slice(1) : chunk).split(/\r\n|\n|\r/)
    afterCR = chunk.endsWith('\r')
    found[0] = rest + found[0]
    rest = found.pop()
    found.forEach(take)
  }
}

function fields(call) {
  let type = '', args = {}
  const handlers = {
    __proto__: null,
    event(value) { type = value },
    id(value) { call.lastEventId = value },
    retry(value) { if (/^\d+$/.test(value)) call.retryInterval = call.wait = Number(value) },
    data(value) {
      const space = value.indexOf(' '), key = value.slice(0, space), text = value.slice(space + 1)
      args[key] = Object.hasOwn(args, key) ? `${args[key]}\n${text}` : text
    },
  }
  const dispatch = () => {
    if (type.startsWith('datastar')) emit(type, call.el, args)
    type = ''
    args = {}
  }
  return line => {
    const [, name, value] = /^([^:]*): ?(.*)$/s.exec(line) ?? []
    line ? handlers[name]?.(value) : dispatch()
  }
}

// ── Patches ── What the two events do to the page. ──────────────────────────────────────────────────────────────────────

const SELF = ['outer', 'replace']           // these find their targets by id when no selector is given
const INSERT = { replace: 'replaceWith', prepend: 'prepend', append: 'append', before: 'before', after: 'after' }

const patchers = {
  'datastar-patch-signals': ({ signals: text, onlyIfMissing }) =>
    mergePatch(parseSignals(text), { ifMissing: onlyIfMissing?.trim() === 'true' }),
  'datastar-patch-elements': args => args.useViewTransition?.trim() === 'true' ? transition(() => patchElements(args)) : patchElements(args),
}

function parseSignals(text) {
  try {
    return JSON.parse(text)
  } catch {
    return compile(text, true)()            // a JavaScript object literal is taken, too
  }
}

function patchElements({ selector = '', mode = 'outer', namespace = 'html', elements = '' }) {
  if (!(mode in INSERT) && !['outer', 'inner', 'remove'].includes(mode)) throw new Error(`PatchElementsInvalidMode: ${mode}`)
  if (!selector && !SELF.includes(mode)) throw new Error(`PatchElementsExpectedSelector: ${mode}`)
  const content = parse(SELF.includes(mode) ? elements.trim() : elements, namespace)
  if (!selector) return [...content.children].forEach(el => patchTarget(ownTarget(el), mode, fragment([el]), `#${el.id}`))
  const targets = document.querySelectorAll(selector)
  if (!targets.length) console.warn(`no element matches ${selector}`)
  for (const target of targets) patchTarget(target, mode, content.cloneNode(true))
}

const ownTarget = el => el.matches('html, head, body') ? document.querySelector(el.localName) : el.id ? document.getElementById(el.id) : null

function patchTarget(target, mode, content, name) {
  if (!target) return console.warn(`no element for the patch of ${name}`)
  const scripts = content.querySelectorAll('script')
  if (mode === 'remove') target.remove()
  else if (mode in INSERT) target[INSERT[mode]](content)
  else morph(target, content, mode)
  for (const script of scripts) if (script.isConnected) script.replaceWith(liveScript(script))
}

const fragment = nodes => {
  const whole = document.createDocumentFragment()
  whole.append(...nodes)
  return whole
}

// A whole document is parsed as one, everything else in a template, where a <tr> or an <option> may stand alone.
function parse(html, namespace) {
  const [whole, part] = /<\/(html|head|body)>/i.exec(html) ?? []
  if (whole) {
    const page = new DOMParser().parseFromString(html, 'text/html')
    if (/<\/html>/i.test(html)) return fragment([page.documentElement])
    return fragment([page.head, page.body].filter(el => new RegExp(`</${el.localName}>`, 'i').test(html)))
  }
  const template = document.createElement('template')
  const tag = { html: '', svg: 'svg', mathml: 'math' }[namespace]
  if (tag === undefined) throw new Error(`PatchElementsInvalidNamespace: ${namespace}`)
  template.innerHTML = tag ? `<${tag}>${html}</${tag}>` : html
  if (!tag) return template.content
  return fragment([...template.content.firstChild.childNodes].filter(node => node.nodeType === Node.ELEMENT_NODE || node.data.trim()))
}

// ── Morph ── Makes an old tree say what a new one says, with as many of the old nodes, and as few writes, as possible. ──────

// An id that occurs once on both sides, with the same tag, is *persistent*: its element will survive wherever it goes.
// A node is *keyed* by the persistent ids in and below it; the more two nodes share, the surer they are the same one.
// The state of a control is never looked at: only where the server's old and new markup differ is it overwritten.

function morph(target, content, mode) {
  if (target.parentElement?.closest('[data-ignore-morph]')) return
  const morphing = new Morph(target, content)
  try {
    if (mode === 'inner') morphing.children(target, content, null, null)
    else morphing.children(target.parentNode, content, target.previousSibling, target.nextSibling)
  } finally {
    morphing.pantry?.remove()
  }
}

class Morph {
  constructor(target, content) {
    this.homes = new Map()                  // persistent id -> its old element
    this.keys = new Map()                   // old or new node -> the persistent ids in it
    const olds = uniqueIds([target, ...target.querySelectorAll('[id]')]), news = uniqueIds(content.querySelectorAll('[id]'))
    for (const [id, el] of olds) {
      if (!el || news.get(id)?.nodeName !== el.nodeName) continue
      this.homes.set(id, el)
      this.key(id, el, target.parentNode)
      this.key(id, news.get(id), content)
    }
  }

  key(id, node, root) {
    for (; node !== root; node = node.parentNode) {
      if (!this.keys.has(node)) this.keys.set(node, new Set())
      this.keys.get(node).add(id)
    }
  }

  weight(node) { return this.keys.get(node)?.size ?? 0 }

  share(old, fresh) {
    for (const id of this.weight(old) && this.weight(fresh) ? this.keys.get(fresh) : []) if (this.keys.get(old).has(id)) return true
    return false
  }

  // Gives every new child its place between `previous` and `end`; what then is left of the old ones goes.
  children(parent, source, previous, end) {
    for (let fresh = source.firstChild, next; fresh; fresh = next) {
      next = fresh.nextSibling
      previous = this.place(fresh, parent, behind(parent, previous), end)
    }
    this.drop(behind(parent, previous), end)
  }

  place(fresh, parent, cursor, end) {
    const partner = this.partner(fresh, cursor, end), home = this.homes.get(idOf(fresh))
    if (partner) {
      this.drop(cursor, partner)
      return this.node(partner, fresh)
    }
    if (home) {
      this.forget(home)
      move(parent, home, cursor)
      return this.node(home, fresh)
    }
    // A new node around old ones starts empty and gathers them.
    if (this.weight(fresh)) return this.node(parent.insertBefore(emptyCopy(fresh), cursor), fresh)
    return parent.insertBefore(fresh, cursor)
  }

  // The old sibling that becomes `fresh`: the first that shares an id, else the first alike that no id holds back.
  partner(fresh, cursor, end) {
    const gain = this.weight(fresh)
    let sibling = fresh.nextSibling, hits = 0, loss = 0, fallback
    for (let old = cursor; old !== end; old = old.nextSibling) {
      if (alike(old, fresh)) {
        if (this.share(old, fresh)) return old
        if (hits < 2 && !fallback && !this.weight(old)) {
          if (!gain) return old
          fallback = old
        }
      }
      loss += this.weight(old)
      if (loss > gain) break                // never displace more than is won
      // Two old nodes that suit the next new ones: `fresh` was inserted before them, and takes none of theirs.
      if (!fallback && hits < 2 && sibling && alike(old, sibling)) {
        hits++
        sibling = sibling.nextSibling
      }
      if (hits === 2 && !gain) break
    }
    return fallback
  }

  drop(node, end) {
    for (let next; node !== end; node = next) {
      next = node.nextSibling
      if (this.weight(node)) move(this.shelf(), node, null)
      else node.remove()
    }
  }

  // The pantry keeps, inside the document, what has to leave its place before its new one is known.
  shelf() {
    if (!this.pantry) {
      this.pantry = document.createElement('div')
      this.pantry.hidden = true
      document.documentElement.append(this.pantry)
    }
    return this.pantry
  }

  forget(home) {
    for (let node = home.parentNode; node; node = node.parentNode) this.keys.get(node)?.delete(idOf(home))
  }

  node(old, fresh) {
    if (old.nodeType !== Node.ELEMENT_NODE) {
      if (old.nodeValue !== fresh.nodeValue) old.nodeValue = fresh.nodeValue
    } else if (!old.hasAttribute('data-ignore-morph') || !fresh.hasAttribute('data-ignore-morph')) {
      const kept = fresh.getAttribute('data-preserve-attr')?.split(/\s+/) ?? []
      const told = tellControl(old, fresh, kept)
      copyAttributes(old, fresh, kept)
      if (told) (old.closest('select') ?? old).dispatchEvent(new Event('datastar-prop-change', { bubbles: true }))
      if (old.localName === 'template') copyTemplate(old, fresh)
      else if (!old.isEqualNode(fresh)) this.children(old, fresh, null, null)
    }
    return old
  }
}

function uniqueIds(elements) {
  const found = new Map()
  for (const el of elements) if (idOf(el)) found.set(idOf(el), found.has(idOf(el)) ? null : el)
  return found
}

const idOf = node => node.nodeType === Node.ELEMENT_NODE ? node.getAttribute('id') : null

const behind = (parent, previous) => previous ? previous.nextSibling : parent.firstChild

const alike = (old, fresh) => old.nodeName === fresh.nodeName && (!idOf(old) || idOf(old) === idOf(fresh))

const emptyCopy = ({ namespaceURI, localName }) => document.createElementNS(namespaceURI, localName)

// moveBefore keeps focus, caret, frames and animations of what it moves; not every browser has it yet.
function move(parent, node, before) {
  parent.moveBefore && parent.isConnected && node.isConnected ? parent.moveBefore(node, before) : parent.insertBefore(node, before)
}

function copyAttributes(old, fresh, kept) {
  for (const attribute of fresh.attributes)
    if (!kept.includes(attribute.name) && old.getAttribute(attribute.name) !== attribute.value) old.setAttributeNode(attribute.cloneNode())
  for (const name of old.getAttributeNames())
    if (!kept.includes(name) && !fresh.hasAttribute(name)) old.removeAttribute(name)
}

const copyTemplate = (old, fresh) => { if (old.innerHTML !== fresh.innerHTML) old.innerHTML = fresh.innerHTML }

// Where markup and state of a control part: [attribute, what the markup says, how to make the control say it].
const has = name => [name, el => el.hasAttribute(name), (el, on) => { el[name] = on }]
const CONTROLS = {
  input: [['value', el => el.getAttribute('value'), (el, text) => { if (el.type !== 'file') el.value = text ?? '' }], has('checked')],
  option: [has('selected')],
  textarea: [['value', el => el.defaultValue, (el, text) => { el.value = text }]],
}

function tellControl(old, fresh, kept) {
  const told = CONTROLS[old.localName]?.filter(([name, says]) => !kept.includes(name) && says(old) !== says(fresh))
  told?.forEach(([, says, tell]) => tell(old, says(fresh)))
  return Boolean(told?.length)
}

// ── Start ── ────────────────────────────────────────────────────────────────────────────────────────────────────────────

document.addEventListener('datastar-fetch', ({ detail: { type, argsRaw } }) => patchers[type]?.(argsRaw))
new MutationObserver(observe).observe(document.documentElement, { subtree: true, childList: true, attributes: true, characterData: true })
batch(() => applyTree(document.documentElement))
document.dispatchEvent(new CustomEvent('datastar-ready'))
