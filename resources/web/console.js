// The web console: the screen by noVNC, the serial console by xterm.js, and what is around them. All comes
// from the machine's own server.

import RFB from '/novnc/core/rfb.js';
import { Terminal } from '/xterm/xterm.mjs';
import { FitAddon } from '/xterm/addon-fit.mjs';

const FIRST_WAIT = 500, LONGEST_WAIT = 8000; // between tries to reconnect, in milliseconds
const KEY_PACE = 15; // between keys that are typed for a text
const RETURN = 0xff0d, TAB = 0xff09, BACKSPACE = 0xff08;

const $ = (id) => document.getElementById(id);
const sleep = (time) => new Promise((done) => setTimeout(done, time));
const states = { screen: 'connecting', serial: 'connecting' };
let key = sessionStorage.getItem('key');
let rfb = null, socket = null;

// --- who is there -----------------------------------------------------------------------------

async function exchange(token) {
    const answer = await fetch('/session', { method: 'POST', headers: { Authorization: `Bearer ${token}` } });
    if (!answer.ok) {
        throw new Error((await answer.text()).trim());
    }
    ({ key } = await answer.json());
    sessionStorage.setItem('key', key);
}

const isKnown = async () => {
    const answer = key && await fetch('/session', { headers: { 'X-Vireo-Key': key } });
    return answer?.status === 204;
};

// Asks until somebody has a token that is good. One question at a time, for both streams.
let asking = null;
function ask(reason) {
    asking ??= new Promise((done) => {
        const entry = $('entry');
        $('entry-error').textContent = reason;
        const submit = async (event) => {
            event.preventDefault();
            // A whole address is as good as the token in it.
            const token = $('token').value.trim().replace(/^.*#token=/, '');
            try {
                await exchange(token);
            } catch (error) {
                $('entry-error').textContent = error.message;
                return;
            }
            entry.removeEventListener('submit', submit);
            $('token').value = '';
            entry.close();
            asking = null;
            done();
        };
        entry.addEventListener('submit', submit);
        entry.addEventListener('cancel', (event) => event.preventDefault());
        tell();
        entry.showModal();
    });
    return asking;
}

async function enter() {
    const token = location.hash.match(/^#token=([0-9a-f]+)$/)?.[1];
    // It is used up: it need not stay in the address or the history.
    history.replaceState(null, '', '/');
    let reason = '';
    if (token) {
        try {
            return await exchange(token);
        } catch (error) {
            reason = error.message;
        }
    }
    if (!await isKnown()) {
        await ask(reason);
    }
}

// --- streams that come back ---------------------------------------------------------------------

function tell() {
    const word = { connecting: 'connecting', connected: 'connected', lost: 'reconnecting' };
    const both = states.screen === states.serial;
    $('state').textContent = both
        ? word[states.screen].replace(/^./, (c) => c.toUpperCase())
        : `Screen ${word[states.screen]}, serial ${word[states.serial]}`;
    document.body.dataset.screen = states.screen;
    document.body.dataset.serial = states.serial;
}

const url = (path) => `ws://${location.host}${path}`;
const protocols = () => ['binary', `key.${key}`];

// Opens a stream by `open`, which resolves when it has ended, again and again.
async function keep(name, open) {
    let wait = FIRST_WAIT;
    for (;;) {
        await open(() => {
            wait = FIRST_WAIT;
            states[name] = 'connected';
            tell();
        });
        states[name] = 'lost';
        tell();
        await sleep(wait);
        wait = Math.min(wait * 2, LONGEST_WAIT);
        try {
            if (!await isKnown()) {
                await ask('The session has ended.');
            }
        } catch {
            // Nobody is there: the machine's process may have ended, and may come back.
        }
    }
}

const screen = (connected) => new Promise((ended) => {
    rfb = new RFB($('screen'), url('/screen'), { wsProtocols: protocols(), shared: true });
    rfb.scaleViewport = true;
    rfb.qualityLevel = 9;
    rfb.background = '#000';
    rfb.addEventListener('connect', () => {
        connected();
        if (document.activeElement === document.body) {
            rfb.focus();
        }
    });
    rfb.addEventListener('desktopname', (event) => {
        $('name').textContent = event.detail.name;
        document.title = `${event.detail.name} – console`;
    });
    rfb.addEventListener('disconnect', () => {
        rfb = null;
        ended();
    });
});

// Styles that the terminal makes have the page's nonce.
const nonce = $('program').nonce;
const createElement = document.createElement.bind(document);
document.createElement = (name, options) => {
    const element = createElement(name, options);
    if (name === 'style') {
        element.nonce = nonce;
    }
    return element;
};

const terminal = new Terminal({
    fontFamily: '"DejaVu Sans Mono", ui-monospace, monospace',
    fontSize: 14,
    scrollback: 5000,
    screenReaderMode: true,
});
const fit = new FitAddon();
terminal.loadAddon(fit);

// What the terminal says goes to the guest. It also answers to what is asked in output of before, which nobody waits for any more.
let speaks = false;

const serial = (connected) => new Promise((ended) => {
    const own = new WebSocket(url('/serial'), protocols());
    socket = own;
    socket.binaryType = 'arraybuffer';
    speaks = false;
    const begin = () => {
        speaks ||= socket === own;
    };
    // How many bytes of before are still to come.
    let before = null;
    socket.onopen = () => {
        // The latest output comes again.
        terminal.reset();
        connected();
    };
    socket.onmessage = (event) => {
        if (before === null) {
            before = new DataView(event.data).getUint32(0);
            if (before === 0) {
                terminal.write('', begin);
            }
            return;
        }
        const bytes = new Uint8Array(event.data);
        const old = bytes.subarray(0, before);
        before -= old.length;
        if (old.length > 0) {
            terminal.write(old, before === 0 ? begin : undefined);
        }
        if (bytes.length > old.length) {
            terminal.write(bytes.subarray(old.length));
        }
    };
    socket.onclose = () => {
        socket = null;
        ended();
    };
});

function send(bytes) {
    if (socket?.readyState === WebSocket.OPEN) {
        socket.send(bytes);
    }
}

terminal.onData((text) => {
    if (speaks) {
        send(new TextEncoder().encode(text));
    }
});
terminal.onBinary((text) => send(Uint8Array.from(text, (c) => c.charCodeAt(0))));

// --- keys -----------------------------------------------------------------------------------------

function symbol(character) {
    const code = character.codePointAt(0);
    switch (character) {
    case '\n':
    case '\r':
        return RETURN;
    case '\t':
        return TAB;
    default:
        return code < 0x100 ? code : 0x01000000 + code;
    }
}

async function type(text) {
    for (const character of text.replace(/\r\n/g, '\n')) {
        rfb?.sendKey(symbol(character));
        await sleep(KEY_PACE);
    }
}

// The keyboard of a phone tells what has been entered, and not by which keys.
const typed = $('typed');
typed.addEventListener('beforeinput', (event) => {
    if (event.inputType === 'insertText' && event.data) {
        type(event.data);
    } else if (event.inputType === 'insertLineBreak') {
        rfb?.sendKey(RETURN);
    } else if (event.inputType === 'deleteContentBackward') {
        rfb?.sendKey(BACKSPACE);
    }
    event.preventDefault();
});
typed.addEventListener('compositionend', (event) => {
    type(event.data);
    typed.value = '';
});

// --- what is around -----------------------------------------------------------------------------------

let last = 'screen';
function view(name) {
    document.body.dataset.view = name;
    document.querySelector(`#views [value=${name}]`).checked = true;
    last = name === 'both' ? last : name;
    resized();
}

function resized() {
    if (document.body.dataset.view === 'both' && innerWidth < 960) {
        return view('screen');
    }
    if (document.body.dataset.view !== 'screen') {
        fit.fit();
    }
}

for (const input of document.querySelectorAll('#views input')) {
    input.addEventListener('change', () => {
        view(input.value);
        if (input.value === 'serial') {
            terminal.focus();
        }
    });
}
for (const name of ['screen', 'serial']) {
    $(name).addEventListener('focusin', () => { last = name; });
}
$('reset').addEventListener('click', () => {
    rfb?.sendCtrlAltDel();
    rfb?.focus();
});
$('keyboard').addEventListener('click', () => {
    if (document.body.dataset.view === 'serial') {
        terminal.focus();
    } else {
        typed.focus();
    }
});
$('full').addEventListener('click', () => {
    if (document.fullscreenElement) {
        document.exitFullscreen();
    } else {
        document.documentElement.requestFullscreen();
    }
});
document.addEventListener('fullscreenchange', () => {
    $('full').setAttribute('aria-pressed', String(document.fullscreenElement !== null));
});
$('paste').addEventListener('click', async () => {
    document.querySelector(`#clipboard [value=${last}]`).checked = true;
    // Where the browser lets the page read it.
    $('text').value = await navigator.clipboard?.readText().catch(() => '') ?? '';
    $('clipboard').showModal();
});
$('clipboard').addEventListener('close', async () => {
    const text = $('text').value;
    $('text').value = '';
    if ($('clipboard').returnValue !== 'type') {
        return;
    }
    if (document.querySelector('#clipboard :checked').value === 'serial') {
        terminal.paste(text);
        terminal.focus();
    } else {
        rfb?.focus();
        await type(text);
    }
});
addEventListener('keydown', (event) => {
    if (event.key === 'F6' && event.shiftKey) {
        event.preventDefault();
        event.stopImmediatePropagation();
        $('reset').focus();
    }
}, { capture: true });
new ResizeObserver(resized).observe(document.querySelector('main'));

terminal.open($('serial'));
view(innerWidth < 960 ? 'screen' : 'both');
await enter();
keep('screen', screen);
keep('serial', serial);
