"""The page's style sheet: nothing to load, one column on a phone, two on a desktop."""

CSS = """
:root{color-scheme:light;--ink:#1c2430;--muted:#5b6675;--line:#dfe4eb;--accent:#1d5fbf;
 --soft:#f5f7fa}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:#fff;color:var(--ink);
 font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1180px;margin:0 auto;padding:20px 16px 56px}
h1{font-size:1.65rem;line-height:1.25;margin:.2em 0 .3em}
h2{font-size:1.22rem;margin:2.4em 0 .5em;padding-top:.7em;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:0 0 .4em}
p{margin:.4em 0 .8em;max-width:82ch}
.lead{font-size:1.05rem}
.note,figcaption,caption{color:var(--muted);font-size:.875rem}
code,pre,.id{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
 font-size:.86em}
nav{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:.875rem;margin:.6em 0}
nav a{color:var(--accent);text-decoration:none}
nav a:hover{text-decoration:underline}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(158px,1fr));gap:10px;
 margin:16px 0}
.card{border:1px solid var(--line);border-radius:8px;padding:10px 12px;background:var(--soft)}
.card b{display:block;font-size:1.32rem;line-height:1.3;font-weight:650;
 font-variant-numeric:tabular-nums}
.card span{display:block;font-size:.82rem;color:var(--muted);line-height:1.4}
.card .what{color:var(--ink);font-weight:600}
.grid{display:grid;grid-template-columns:minmax(0,1fr);gap:22px 28px;align-items:start}
figure{margin:0;min-width:0}
figure svg{display:block;width:100%;height:auto}
figure svg *{stroke-linejoin:round;stroke-linecap:butt}
figcaption{margin-top:4px}
@media(min-width:860px){.grid{grid-template-columns:repeat(2,minmax(0,1fr))}
 main{padding:28px 28px 64px}}
.scroll{overflow-x:auto;margin:.6em 0 1em;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums;min-width:50%}
caption{text-align:left;padding-bottom:6px}
th,td{padding:5px 10px 5px 0;text-align:left;border-bottom:1px solid var(--line);
 vertical-align:top}
td{white-space:nowrap}
th{font-weight:600;vertical-align:bottom;line-height:1.3}
.tight table{font-size:.82rem}
.tight th,.tight td{padding-right:7px}
th.number,td.number{text-align:right}
th small{display:block;font-weight:400;color:var(--muted)}
td.wrap{white-space:normal;min-width:220px}
pre{background:var(--soft);border:1px solid var(--line);border-radius:8px;padding:10px 12px;
 overflow-x:auto;margin:.5em 0;line-height:1.5}
details{margin:.5em 0}
summary{cursor:pointer;color:var(--accent)}
.tag{display:inline-block;background:var(--accent);color:#fff;border-radius:4px;padding:0 6px;
 font-size:.76rem;line-height:1.6;margin-right:4px;font-weight:600}
.key{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:.84rem;max-width:none}
.key span{display:inline-flex;align-items:center;gap:6px}
.swatch{display:inline-block;width:16px;height:16px;border-radius:4px}
.network{border:1px solid var(--line);border-radius:8px;padding:12px;min-width:0}
.network p{font-size:.875rem;margin:.2em 0 .7em}
.layers{display:grid;gap:5px}
.slot{display:grid;grid-template-columns:1.1em minmax(0,1.15fr) minmax(0,1fr);gap:8px;
 align-items:stretch}
.slot>b{color:var(--muted);font-size:.78rem;align-self:center;text-align:right}
.end{background:#e9edf3;border-radius:5px;padding:2px 10px;font-size:.8rem;text-align:center;
 color:var(--ink)}
.block,.ffn,div.empty{border-radius:6px;padding:5px 9px;font-size:.84rem;line-height:1.35;
 min-width:0;overflow-wrap:anywhere}
.block{color:#fff}
.ffn{background:var(--soft);border:1px solid var(--line)}
.block small,.ffn small{display:block;font-size:.76rem}
.ffn small{color:var(--muted)}
.block em,.ffn em{font-style:normal;font-size:.72rem;border:1px solid currentColor;
 border-radius:3px;padding:0 4px;font-weight:600;white-space:nowrap}
.empty{border:1.5px dashed #aab3c0;background:#fff;color:var(--muted)}
div.empty{display:flex;align-items:center;justify-content:center;min-height:34px}
.both{grid-column:2/4}
.striped{background-image:repeating-linear-gradient(135deg,transparent 0 7px,
 rgba(0,0,0,.17) 7px 12px)}
.track{display:block;height:9px;background:#dde3eb;border-radius:3px;margin:4px 0;
 overflow:hidden}
.bar{display:block;height:100%}
.heads{display:flex;flex-wrap:wrap;gap:3px 7px;margin:4px 0}
.heads i{display:inline-flex;gap:2px}
.heads u{width:9px;height:9px;border-radius:2px;text-decoration:none}
.strip{display:inline-flex;gap:2px;vertical-align:middle}
.strip i{width:12px;height:12px;border-radius:3px}
.strip .empty{border-width:1px}
.strip .bare{background:#c9d0da}
@media print{nav{display:none}.network,figure{break-inside:avoid}}
"""
