// Browsers refuse workers to pages that are read from files. There the search, the only worker of the site, gets a hidden
// frame instead: a thread is what it loses.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      this.ready = new Promise((done) => {
        frame.onload = () => {
          frame.onload = null;
          const inside = frame.contentWindow;
          inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
          const script = inside.document.createElement("script");
          script.src = url;
          script.onload = () => done(inside);
          inside.document.head.append(script);
        };
      });
      document.body.append(frame);
    }

    postMessage(data) {
      this.ready.then((inside) => {
        const own = inside.structuredClone(data); // its arrays are instances of the frame's Array, as a worker's would be
        inside.dispatchEvent(new inside.MessageEvent("message", { data: own }));
      });
    }
  };
}
