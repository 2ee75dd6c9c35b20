"""The style and the script of a report: inline, allowed by their digests alone, and fetching nothing."""

from __future__ import annotations

import base64
import hashlib

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--card:#f6f7f9;--line:#dfe3e8;--text:#15181d;--dim:#5b6470;--grid:#e9ecf0;
--good:#0b7a4b;--good-bg:#e8f6ef;--bad:#b3261e;--bad-bg:#fdecea;--warn:#8a5300;--warn-bg:#fff4e0;--limit:#c2255c;
--s0:#2563eb;--s1:#d9480f;--s2:#0b8a5f;--s3:#8b3fd1;--s4:#c2255c;--s5:#0c8599;--s6:#8a6d00;--s7:#5c6470}
@media (prefers-color-scheme:dark){:root{--bg:#0f1217;--card:#171b22;--line:#2b323c;--text:#e7eaef;--dim:#9aa4b2;
--grid:#222833;--good:#5cd6a0;--good-bg:#10291f;--bad:#ff8f86;--bad-bg:#341614;--warn:#ffc266;--warn-bg:#2f2310;
--limit:#ff85ac;--s0:#74a7ff;--s1:#ff9a5c;--s2:#4cc796;--s3:#c79bff;--s4:#ff85ac;--s5:#4dd0e1;--s6:#e0c04a;
--s7:#a9b2bf}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--text);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1180px;margin:0 auto;padding:28px 24px 64px}
h1{font-size:26px;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere;letter-spacing:-.01em}
h2{font-size:18px;margin:40px 0 10px;letter-spacing:-.005em}
h3{font-size:14px;margin:22px 0 8px;color:var(--dim);font-weight:600}
p{margin:6px 0;overflow-wrap:anywhere}
.dim,.note{color:var(--dim);font-size:13px}
.note{margin:2px 0 0}
.lead{font-size:17px;line-height:1.55;max-width:78ch;margin:12px 0 18px}
a{color:var(--s0)}
code{font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
.verdict{border:1px solid;border-left-width:6px;border-radius:8px;padding:12px 16px;margin:16px 0}
.verdict b.word{font-size:17px}
.verdict ul{margin:6px 0 0;padding-left:20px}
.verdict li{margin:3px 0;overflow-wrap:anywhere}
.valid{color:var(--good);border-color:var(--good);background:var(--good-bg)}
.invalid{color:var(--bad);border-color:var(--bad);background:var(--bad-bg)}
.degraded,.open{color:var(--warn);border-color:var(--warn);background:var(--warn-bg)}
.verdict p,.verdict li{color:var(--text)}
.badge{display:inline-block;border:1px solid;border-radius:999px;padding:0 8px;font-size:12px;line-height:19px;
font-weight:600;white-space:nowrap}
.tiles{display:grid;grid-template-columns:repeat(4,minmax(0,1fr));gap:10px;margin:10px 0 16px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 14px;min-width:0}
.tile b{display:block;font-size:22px;line-height:1.3;font-weight:650;font-variant-numeric:tabular-nums;
letter-spacing:-.01em;white-space:nowrap}
.tile span{display:block;color:var(--dim);font-size:12.5px}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:8px;margin:8px 0}
table{border-collapse:separate;border-spacing:0;width:100%;font-size:13px;font-variant-numeric:tabular-nums}
th,td{padding:6px 9px;text-align:left;border-top:1px solid var(--line);vertical-align:top}
thead th{border-top:0;background:var(--card);color:var(--dim);font-weight:600;white-space:nowrap;font-size:12px}
td.n,th.n{text-align:right;white-space:nowrap}
td:first-child,th:first-child{position:sticky;left:0;background:var(--bg);z-index:1}
thead th:first-child{background:var(--card)}
tr.bad td{color:var(--dim)}
tr.best td{font-weight:650}
.text td{min-width:12ch;overflow-wrap:anywhere}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:22px 34px;margin:10px 0}
.charts.four{grid-template-columns:repeat(auto-fit,minmax(min(100%,236px),1fr));gap:22px 26px}
.chart{margin:0;min-width:0;break-inside:avoid}
figcaption{font-size:13px;line-height:1.45;margin-bottom:8px;min-height:20px}
.unit{color:var(--dim);font-size:12px}
.legend{display:flex;flex-wrap:wrap;gap:0 12px;color:var(--dim);font-size:12px}
.key{display:inline-flex;align-items:center;gap:5px;max-width:100%;overflow-wrap:anywhere}
.key::before{content:"";flex:none;width:15px;border-top:2.5px solid var(--c)}
.key.dashed::before{border-top-style:dashed}
.frame{position:relative;padding:2px 8px 30px 52px}
svg{overflow:visible;display:block}
svg text{font-size:11px;fill:var(--dim);font-variant-numeric:tabular-nums}
svg .yt,svg .end{text-anchor:end}
svg .xt,svg .none{text-anchor:middle}
svg .xl{text-anchor:end}
svg .rt,svg .ft{fill:var(--text);paint-order:stroke;stroke:var(--bg);stroke-width:3px;stroke-linejoin:round}
.lines path{fill:none;stroke:var(--c);stroke-width:1.7;stroke-linejoin:round;stroke-linecap:round}
.lines .grid{stroke:var(--grid);stroke-width:1}
.lines .dashed{stroke-dasharray:5 4}
.lines .faint{opacity:.35}
.outside{fill:var(--dim);opacity:.13}
.bracket{fill:var(--s3);opacity:.2}
.rule{stroke:var(--dim);stroke-dasharray:3 3}
.limit{stroke:var(--limit);stroke-width:1.5;stroke-dasharray:none}
.dot{fill:var(--c);stroke:var(--bg)}
.ring{fill:var(--bg);stroke:var(--c);stroke-width:1.8}
.drop{stroke:var(--dim);stroke-dasharray:2 3}
.hair{stroke:var(--text);opacity:.45}
.s0{--c:var(--s0)}.s1{--c:var(--s1)}.s2{--c:var(--s2)}.s3{--c:var(--s3)}.s4{--c:var(--s4)}.s5{--c:var(--s5)}
.s6{--c:var(--s6)}.s7{--c:var(--s7)}
.tip b{display:block}.tip .key{display:flex}
.tip{position:absolute;pointer-events:none;background:var(--card);border:1px solid var(--line);border-radius:6px;
padding:4px 8px;font-size:12px;line-height:1.4;white-space:nowrap;z-index:3;box-shadow:0 2px 10px #0003}
details{border:1px solid var(--line);border-radius:8px;margin:8px 0;padding:0 16px}
details[open]{padding-bottom:14px}
summary{cursor:pointer;padding:9px 0;font-weight:600;overflow-wrap:anywhere}
summary .dim{font-weight:400;font-variant-numeric:tabular-nums}
dl{display:grid;grid-template-columns:minmax(110px,max-content) 1fr;gap:3px 18px;margin:8px 0;font-size:13.5px}
dt{color:var(--dim)}
dd{margin:0;overflow-wrap:anywhere;min-width:0}
pre{font:12px/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;white-space:pre-wrap;overflow-wrap:anywhere;
background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 14px;margin:8px 0;max-height:420px;
overflow:auto}
button{font:inherit;font-size:13.5px;color:inherit;background:var(--card);border:1px solid var(--line);
border-radius:6px;padding:5px 12px;margin:0 8px 8px 0;cursor:pointer}
footer{margin-top:44px;padding-top:12px;border-top:1px solid var(--line);color:var(--dim);font-size:12.5px}
@media (max-width:640px){main{padding:18px 14px 40px}h1{font-size:22px}.lead{font-size:16px}
.tiles{grid-template-columns:1fr 1fr}.tile b{font-size:19px}details{padding:0 10px}th,td{padding:6px 9px}
.frame{padding-left:44px}dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:7px}}
@media print{:root{color-scheme:light;--bg:#fff;--card:#f6f7f9;--line:#ccc;--text:#000;--dim:#444;--grid:#e4e4e4;
--good:#0b7a4b;--good-bg:#fff;--bad:#b3261e;--bad-bg:#fff;--warn:#8a5300;--warn-bg:#fff;--limit:#c2255c;--s0:#2563eb;
--s1:#d9480f;--s2:#0b8a5f;--s3:#8b3fd1;--s4:#c2255c;--s5:#0c8599;--s6:#8a6d00;--s7:#5c6470}
body{font-size:11pt}main{max-width:none;padding:0}.raw,.tip,.hair{display:none}.scroll{overflow:visible}
table{font-size:7pt}th,td{padding:2px 3px}
.badge{padding:0 4px;font-size:7pt;line-height:1.5}td.n,th.n{white-space:normal}pre{max-height:none}
tr,.tile{break-inside:avoid}
h2,h3,summary{break-after:avoid}.charts{grid-template-columns:1fr 1fr}}
"""

SCRIPT = """
'use strict';
(function(){
var UNITS=10000,NS='http://www.w3.org/2000/svg';
function scale(text){var p=text.split(' ');return{log:p[0]==='log',low:+p[1],high:+p[2]};}
function back(s,share){return s.log?Math.exp(Math.log(s.low)+share*(Math.log(s.high)-Math.log(s.low))):
s.low+share*(s.high-s.low);}
function told(v){var a=Math.abs(v);if(!isFinite(v))return '-';if(a>=99.95)return Math.round(v).toLocaleString('en');
if(a>=9.995)return v.toFixed(1);if(a>=0.9995)return v.toFixed(2);return a?String(+v.toPrecision(3)):'0';}
function read(svg){if(svg.kept)return svg.kept;
var lines=[].map.call(svg.querySelectorAll('path[data-name]'),function(path){
var points=[],x=0,y=0;
path.getAttribute('d').replace(/([Ml])(-?\\d+) (-?\\d+)/g,function(all,kind,first,second){
x=kind==='M'?+first:x+ +first;y=kind==='M'?+second:y+ +second;points.push([x,y]);return all;});
return{name:path.getAttribute('data-name'),style:path.getAttribute('class'),points:points};});
svg.kept={lines:lines,x:scale(svg.getAttribute('data-x')),y:scale(svg.getAttribute('data-y'))};return svg.kept;}
function hair(svg,share){var line=svg.querySelector('.hair');
if(!line){line=document.createElementNS(NS,'line');line.setAttribute('class','hair');line.setAttribute('y2','100%');
svg.appendChild(line);}
line.setAttribute('x1',share*100+'%');line.setAttribute('x2',share*100+'%');}
function clear(){document.querySelectorAll('.hair,.tip').forEach(function(it){it.remove();});}
function show(svg,share){var kept=read(svg),at=share*UNITS,tip=document.createElement('div'),said=false;
tip.className='tip';var head=document.createElement('b');
head.textContent=told(back(kept.x,share))+' '+(svg.getAttribute('data-x-label')||'');tip.appendChild(head);
kept.lines.slice(0,14).forEach(function(line){var best=null;line.points.forEach(function(p){
if(best===null||Math.abs(p[0]-at)<Math.abs(best[0]-at))best=p;});
if(best===null||Math.abs(best[0]-at)>UNITS/12)return;said=true;
var row=document.createElement('div');row.className='key '+line.style.replace('faint','');
row.textContent=line.name+' '+told(back(kept.y,1-best[1]/UNITS));tip.appendChild(row);});
if(!said)return;
var frame=svg.parentNode;frame.appendChild(tip);
var left=svg.getBoundingClientRect().left-frame.getBoundingClientRect().left+share*svg.getBoundingClientRect().width;
var room=frame.getBoundingClientRect().width;
tip.style.left=(left+tip.offsetWidth+14>room?Math.max(0,left-tip.offsetWidth-10):left+10)+'px';tip.style.top='4px';}
document.addEventListener('pointermove',function(event){var svg=event.target.closest&&event.target.closest('svg.plot');
clear();if(!svg)return;var box=svg.getBoundingClientRect(),share=(event.clientX-box.left)/box.width;
if(share<0||share>1)return;var group=svg.getAttribute('data-group');hair(svg,share);
if(group)document.querySelectorAll('svg.plot').forEach(function(other){
if(other!==svg&&other.getAttribute('data-group')===group)hair(other,share);});
show(svg,share);});
document.addEventListener('pointerleave',clear);
document.querySelectorAll('button[data-of]').forEach(function(button){button.addEventListener('click',function(){
var text=document.getElementById(button.getAttribute('data-of')).textContent,link=document.createElement('a');
link.href=URL.createObjectURL(new Blob([text],{type:'application/json'}));
link.download=button.getAttribute('data-name');
document.body.appendChild(link);link.click();link.remove();setTimeout(function(){URL.revokeObjectURL(link.href);},60000);
});});
window.addEventListener('beforeprint',function(){var all=document.querySelectorAll('details');
if(all.length<=30)all.forEach(function(it){it.open=true;});});
})();
"""


def digest_of(text: str) -> str:
    """As a content security policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


POLICY = (
    f"default-src 'none'; style-src {digest_of(STYLE)}; script-src {digest_of(SCRIPT)}; base-uri 'none'; "
    "form-action 'none'"
)
