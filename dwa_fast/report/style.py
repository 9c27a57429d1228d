"""The style sheet of the report: light and dark, from a phone to a desk."""

STYLE = """
:root{color-scheme:light dark;--page:#fff;--text:#1b1c1d;--soft:#59616a;--line:#dde1e6;--panel:#f5f6f8;--link:#1f5fa8}
@media(prefers-color-scheme:dark){:root{--page:#16181c;--text:#e4e6e9;--soft:#a3aab3;--line:#353a42;--panel:#1e2127;--link:#8ab8f0}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--text);overflow-wrap:break-word;
  font:1rem/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
a{color:var(--link);text-underline-offset:.15em}
:focus-visible{outline:2px solid var(--link);outline-offset:2px}
.layout{max-width:80rem;margin:0 auto;padding:1.25rem 1.25rem 4rem}
h1,h2,h3{line-height:1.25;text-wrap:balance}
h1{font-size:1.75rem;margin:0 0 1.5rem}
h2{font-size:1.375rem;margin:0 0 .25rem}
h3{font-size:1.0625rem;margin:0 0 .25rem}
p{margin:0 0 1rem;max-width:44rem}
nav{font-size:.9375rem;border-bottom:1px solid var(--line);margin-bottom:2rem;padding-bottom:.75rem}
nav h2{font-size:.8125rem;font-weight:600;color:var(--soft);margin:0 0 .375rem}
nav ul{list-style:none;margin:0 0 1rem;padding:0}
nav li{margin:.25rem 0}
nav a{text-decoration:none}
nav a:hover{text-decoration:underline}
main>section{margin-bottom:3.5rem}
section{scroll-margin-top:1rem;min-width:0}
.line,.note,figcaption{color:var(--soft);font-size:.875rem}
.line{margin-bottom:1rem}
figure{margin:0 0 1.5rem;min-width:0}
figcaption strong{color:var(--text);font-weight:600}
figcaption{margin-top:.5rem;max-width:44rem}
.table figcaption{margin:0 0 .375rem;font-size:1rem}
.note{margin:.5rem 0 0}
.scroll{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-size:.9375rem;font-variant-numeric:tabular-nums}
th,td{padding:.375rem .875rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th:first-child{position:sticky;left:0;background:var(--page);text-align:left;padding-left:0}
thead th{color:var(--soft);font-weight:600;font-size:.875rem;vertical-align:bottom}
tbody th{font-weight:500}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));gap:0 2.5rem;align-items:start}
img,svg{max-width:100%;height:auto;display:block}
figure>svg{width:100%;max-width:36rem}
.sheet{display:grid;grid-template-columns:auto minmax(0,1fr);gap:.625rem}
.sheet ul{display:grid;grid-auto-rows:minmax(0,1fr);align-items:center;list-style:none;margin:0;padding:0;
  font-size:.75rem;line-height:1;text-align:right;max-width:7rem}
.sheet li{overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.sets{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,22rem),1fr));gap:2.5rem;margin:1rem 0 3.5rem}
pre{margin:0 0 1rem;padding:.75rem 1rem;background:var(--panel);border-radius:.375rem;white-space:pre-wrap;overflow-wrap:anywhere}
code{font:.875rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
details{margin:0 0 .5rem}
summary{cursor:pointer;color:var(--soft);font-size:.9375rem;padding:.25rem 0}
details details{margin-left:1.125rem}
dl{max-width:44rem;margin:.25rem 0 .75rem 1.125rem;font-size:.875rem}
dl div{display:grid;grid-template-columns:minmax(0,14rem) minmax(0,1fr);gap:.25rem 1rem;padding:.25rem 0;
  border-bottom:1px solid var(--line)}
dt{color:var(--soft)}
dd{margin:0;overflow-wrap:anywhere}
@media(max-width:30rem){th,td{padding:.375rem .5rem}dl div{grid-template-columns:minmax(0,1fr)}}
@media(min-width:64rem){
  .layout{display:grid;grid-template-columns:14rem minmax(0,1fr);column-gap:3.5rem;padding-top:2.5rem}
  header,main{grid-column:2}
  nav{grid-area:1/1/span 2/1;position:sticky;top:2.5rem;align-self:start;max-height:calc(100vh - 5rem);overflow-y:auto;
    border:0;margin:0;padding:0}
}
@media print{nav{display:none}.layout{display:block;max-width:none}figure,tr{break-inside:avoid}}
""".strip()
