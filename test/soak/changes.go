package main

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	impsync "github.com/imps-node/imps/pkg/sync"
	"github.com/imps-node/imps/test/imps"
)

// changes are what users do. Each chooses by the generator and the model alone, never by
// what it finds: so the same seed makes the same steps.
func changes() []card {
	return []card{
		{"create a resource", 3, createResource},
		{"claim the same", 2, claimTheSame},
		{"delete a resource", 2, deleteResource(metav1.DeletePropagationBackground)},
		{"delete a resource in the foreground", 1, deleteResource(metav1.DeletePropagationForeground)},
		{"delete a resource and orphan", 1, deleteResource(metav1.DeletePropagationOrphan)},
		{"change selectors", 5, changeSpec(func(s *soak, spec *spec) { s.newSelectors(spec) })},
		{"change sources", 3, changeSpec(func(s *soak, spec *spec) { spec.sources = s.newSources() })},
		{"change the target's name", 2, changeSpec(func(_ *soak, spec *spec) {
			spec.target = targets[(slices.Index(targets, spec.target)+1)%len(targets)]
		})},
		{"change the target's labels", 2, changeSpec(func(s *soak, spec *spec) { spec.labels, spec.annotations = s.newMarks(), s.newMarks() })},
		{"empty a spec", 1, emptySpec},
		{"fill a spec", 2, fillSpec},

		{"create a namespace", 4, createNamespace},
		{"delete a namespace", 2, deleteNamespace},
		{"label a namespace", 5, changeNamespace("labels", func(s *soak, n *namespace) { n.labels = s.newLabels() })},
		{"annotate a namespace", 3, changeNamespace("annotations", func(s *soak, n *namespace) { n.annotations = s.newAnnotations() })},

		{"create a pod", 6, createPod},
		{"delete a pod", 4, deletePod},
		{"relabel a pod", 3, relabelPod},
		{"a pod runs", 3, runPod},

		{"rotate a source", 6, rotateSource},
		{"break a source", 2, breakSource},
		{"repair a source", 2, repairSource},
		{"delete a source", 1, deleteSource},
		{"restore a source", 2, restoreSource},

		{"edit a target's data", 2, editTarget(`{"data":{".dockerconfigjson":"e30="}}`, nil)},
		{"edit a target's revision", 1, editTarget(`{"metadata":{"annotations":{"`+impsync.AnnotationRevision+`":"UID.99999"}}}`, nil)},
		{"edit a target's label", 2, editTargetLabel},
		{"add a label to a target", 1, editTarget(`{"metadata":{"labels":{"mine":"x"}}}`, func(s *soak, k key, _ types.UID) {
			if kept := s.keep[k]; kept != nil {
				kept.labelled = true
			}
		})},
		{"take a target's owner", 1, editTarget(`{"metadata":{"ownerReferences":null}}`, mayStay)},
		{"clear a target's managedFields", 1, editTarget(`{"metadata":{"managedFields":[{}]}}`, func(s *soak, k key, uid types.UID) {
			mayStay(s, k, uid)
			s.unmanaged[uid] = true
		})},
		{"delete a target", 2, deleteTarget},
		{"take a target over", 1, takeTargetOver},
		{"put a foreign Secret in the way", 3, putForeign},
		{"take a foreign Secret away", 3, removeForeign},
	}
}

// targets are the names that targets may have.
var targets = []string{imps.SecretName, imps.SecretName + "-b"}

// What selectors and what they look at are made of.
var (
	namespaceLabels      = map[string][]string{"team": {"red", "blue"}, "tier": {"front", "back"}}
	namespaceAnnotations = map[string][]string{"example.test/pull": {"yes: all of it", "no"}}
	podLabels            = map[string][]string{"app": {"web", "db", "job"}}
	podAnnotations       = map[string][]string{"example.test/image": {"private", "public"}}
	marks                = map[string][]string{"team": {"a", "b"}, "example.test/kind": {"x", "y"}}
	registries           = []string{"one.test", "two.test", "three.test", "four.test"}
)

// some returns for each key one of its values, or none.
func (s *soak) some(vocabulary map[string][]string) map[string]string {
	chosen := map[string]string{}
	for _, k := range slices.Sorted(maps.Keys(vocabulary)) {
		if s.random.IntN(3) > 0 {
			chosen[k] = pick(s, vocabulary[k])
		}
	}
	return chosen
}

func (s *soak) newLabels() map[string]string      { return s.some(namespaceLabels) }
func (s *soak) newAnnotations() map[string]string { return s.some(namespaceAnnotations) }
func (s *soak) newMarks() map[string]string       { return s.some(marks) }

// newSelector returns a selector; now and then one that matches everything.
func (s *soak) newSelector(vocabulary map[string][]string) selector {
	if s.random.IntN(12) == 0 {
		return selector{}
	}
	k := pick(s, slices.Sorted(maps.Keys(vocabulary)))
	r := requirement{key: k, operator: pick(s, []string{"Is", "Is", "Is", "In", "NotIn", "Exists", "DoesNotExist"})}
	if r.operator == "Is" || r.operator == "In" || r.operator == "NotIn" {
		r.values = []string{pick(s, vocabulary[k])}
	}
	chosen := selector{r}
	if more := s.some(vocabulary); len(more) > 1 && more[k] == "" && s.random.IntN(3) == 0 {
		for _, other := range slices.Sorted(maps.Keys(more)) {
			chosen = append(chosen, requirement{key: other, operator: "Is", values: []string{more[other]}})
		}
	}
	return chosen
}

func (s *soak) newSelectors(spec *spec) {
	spec.names, spec.nsLabels, spec.nsAnnotations, spec.podLabels, spec.podAnnotations = nil, nil, nil, nil, nil
	for range 1 + s.random.IntN(3) {
		switch s.random.IntN(6) {
		case 0, 1:
			spec.nsLabels = append(spec.nsLabels, s.newSelector(namespaceLabels))
		case 2:
			spec.nsAnnotations = append(spec.nsAnnotations, s.newSelector(namespaceAnnotations))
		case 3:
			spec.podLabels = append(spec.podLabels, s.newSelector(podLabels))
		case 4:
			spec.podAnnotations = append(spec.podAnnotations, s.newSelector(podAnnotations))
		default: // also one that does not exist
			spec.names = append(spec.names, fmt.Sprintf("ns-%d", s.random.IntN(12)))
		}
	}
}

// newSources returns sources in some order, seldom with one that may not be used.
func (s *soak) newSources() []string {
	all := slices.Sorted(maps.Keys(s.sources))
	s.random.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	chosen := all[:1+s.random.IntN(3)]
	if s.random.IntN(10) == 0 {
		chosen = append(slices.Clone(chosen), elsewhere)
	}
	return chosen
}

func (s *soak) number() int {
	s.numbers++
	return s.numbers
}

func createResource(ctx context.Context, s *soak) (string, error) {
	spec := spec{target: pick(s, targets), labels: s.newMarks(), annotations: s.newMarks(), sources: s.newSources()}
	s.newSelectors(&spec)
	return s.makeResource(ctx, spec)
}

func claimTheSame(ctx context.Context, s *soak) (string, error) {
	rival := pick(s, names(s.resources, func(r *resource) bool { return !r.spec.empty() }))
	if rival == "" {
		return "", nil
	}
	spec := s.resources[rival].spec
	spec.sources, spec.labels = s.newSources(), s.newMarks()
	what, err := s.makeResource(ctx, spec)
	if what != "" {
		what += " as " + rival
	}
	return what, err
}

func (s *soak) makeResource(ctx context.Context, spec spec) (string, error) {
	if len(s.freeResources) == 0 {
		return "", nil
	}
	r := &resource{name: s.freeResources[0], spec: spec, born: true, unlisted: map[string]bool{}}
	s.freeResources = s.freeResources[1:]
	number := fmt.Sprint(s.number())
	object := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": v1alpha1.GroupVersion.String(), "kind": v1alpha1.Kind.Kind,
		"metadata": map[string]any{"name": r.name, "annotations": map[string]any{"soak.test/number": number}},
		"spec":     spec.object(),
	}}
	err := until(ctx, "create resource "+r.name, func(ctx context.Context) error {
		created, err := s.images().Create(ctx, object, metav1.CreateOptions{})
		if apierrors.IsAlreadyExists(err) { // the last of that name is going; or it was an earlier try
			there, getErr := s.images().Get(ctx, r.name, metav1.GetOptions{})
			if getErr == nil && there.GetAnnotations()["soak.test/number"] == number {
				created, err = there, nil
			} else if getErr == nil {
				err = errors.Join(err, s.helpCollector(ctx, there))
			}
		}
		if err != nil {
			return err
		}
		r.uid, r.created = created.GetUID(), created.GetCreationTimestamp().Time
		return nil
	})
	s.resources[r.name] = r
	return describe(r), err
}

// describe says what there is to know of a resource.
func describe(r *resource) string {
	raw, err := json.Marshal(r.spec.object())
	if err != nil {
		return err.Error()
	}
	return r.name + " " + string(r.uid) + " " + strings.ReplaceAll(string(raw), `"`, "")
}

func deleteResource(policy metav1.DeletionPropagation) func(context.Context, *soak) (string, error) {
	return func(ctx context.Context, s *soak) (string, error) {
		r := s.resources[pick(s, names(s.resources, func(*resource) bool { return true }))]
		if r == nil || len(s.resources) < 3 {
			return "", nil
		}
		if policy == metav1.DeletePropagationOrphan {
			if r.renderedLost {
				return r.name + ", not without its rendered Secret", nil // where it has no targets, either, its state Secret would stay
			}
			s.orphaned(r)
		}
		delete(s.resources, r.name)
		s.freeResources = append(s.freeResources, r.name)
		return r.name, until(ctx, "delete resource "+r.name, func(ctx context.Context) error {
			err := s.images().Delete(ctx, r.name, metav1.DeleteOptions{PropagationPolicy: &policy, Preconditions: &metav1.Preconditions{UID: &r.uid}})
			return ignore(err, apierrors.IsNotFound, apierrors.IsConflict)
		})
	}
}

// changeSpec changes the spec of a resource that has one.
func changeSpec(change func(*soak, *spec)) func(context.Context, *soak) (string, error) {
	return func(ctx context.Context, s *soak) (string, error) {
		r := s.resources[pick(s, names(s.resources, func(r *resource) bool { return !r.spec.empty() }))]
		if r == nil {
			return "", nil
		}
		spec := r.spec
		change(s, &spec)
		return s.writeSpec(ctx, r, spec)
	}
}

func fillSpec(ctx context.Context, s *soak) (string, error) {
	r := s.resources[pick(s, names(s.resources, func(r *resource) bool { return r.spec.empty() }))]
	if r == nil {
		return "", nil
	}
	spec := spec{target: pick(s, targets), sources: s.newSources()}
	s.newSelectors(&spec)
	return s.writeSpec(ctx, r, spec)
}

func emptySpec(ctx context.Context, s *soak) (string, error) {
	r := s.resources[pick(s, names(s.resources, func(r *resource) bool { return !r.spec.empty() }))]
	if r == nil || len(s.resources) < 3 {
		return "", nil
	}
	r.emptied = true
	return s.writeSpec(ctx, r, spec{})
}

func (s *soak) writeSpec(ctx context.Context, r *resource, spec spec) (string, error) {
	r.spec = spec
	for name := range s.sources {
		if !slices.Contains(spec.sources, name) {
			r.unlisted[name] = true
		}
	}
	patch := []map[string]any{{"op": "add", "path": "/spec", "value": spec.object()}}
	if spec.empty() { // there or not, it is gone after that
		patch = append(patch, map[string]any{"op": "remove", "path": "/spec"})
		patch[0]["value"] = map[string]any{}
	}
	return describe(r), s.patchResource(ctx, r, patch)
}

func (s *soak) patchResource(ctx context.Context, r *resource, patch any) error {
	raw, err := json.Marshal(patch)
	if err != nil {
		return err
	}
	return until(ctx, "change resource "+r.name, func(ctx context.Context) error {
		_, err := s.images().Patch(ctx, r.name, types.JSONPatchType, raw, metav1.PatchOptions{})
		return err
	})
}

func createNamespace(ctx context.Context, s *soak) (string, error) {
	if len(s.freeNamespaces) < 3 { // those that were given up last may be going still
		return "", nil
	}
	n := &namespace{name: s.freeNamespaces[0], labels: s.newLabels(), annotations: s.newAnnotations()}
	s.freeNamespaces = s.freeNamespaces[1:]
	number := fmt.Sprint(s.number())
	annotations := maps.Clone(n.annotations)
	annotations["soak.test/number"] = number
	object := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: n.name, Labels: n.labels, Annotations: annotations}}
	s.namespaces[n.name] = n
	return fmt.Sprintf("%s %v %v", n.name, n.labels, n.annotations), until(ctx, "create namespace "+n.name, func(ctx context.Context) error {
		_, err := s.core.CoreV1().Namespaces().Create(ctx, object, metav1.CreateOptions{})
		if apierrors.IsAlreadyExists(err) {
			there, getErr := s.core.CoreV1().Namespaces().Get(ctx, n.name, metav1.GetOptions{})
			if getErr == nil && there.Annotations["soak.test/number"] == number {
				return nil
			}
		}
		return err
	})
}

// own are the namespaces that the soak has made.
func (s *soak) own() []string {
	return names(s.namespaces, func(n *namespace) bool { return !n.fixed })
}

func deleteNamespace(ctx context.Context, s *soak) (string, error) {
	own := s.own()
	n := s.namespaces[pick(s, own)]
	if n == nil || len(own) < 4 {
		return "", nil
	}
	for k, f := range s.foreign {
		if k.namespace != n.name {
			continue
		}
		if err := s.untouched(ctx, k, f); err != nil {
			return "", err
		}
		delete(s.foreign, k)
	}
	delete(s.namespaces, n.name)
	s.freeNamespaces = append(s.freeNamespaces, n.name)
	maps.DeleteFunc(s.pods, func(_ string, p *pod) bool { return p.namespace == n.name })
	return n.name, until(ctx, "delete namespace "+n.name, func(ctx context.Context) error {
		return ignore(s.core.CoreV1().Namespaces().Delete(ctx, n.name, metav1.DeleteOptions{}), apierrors.IsNotFound, apierrors.IsConflict)
	})
}

func changeNamespace(field string, change func(*soak, *namespace)) func(context.Context, *soak) (string, error) {
	return func(ctx context.Context, s *soak) (string, error) {
		n := s.namespaces[pick(s, s.own())]
		if n == nil {
			return "", nil
		}
		change(s, n)
		object, now := map[string]any{}, n.labels
		vocabulary := namespaceLabels
		if field == "annotations" {
			vocabulary, now = namespaceAnnotations, n.annotations
		}
		for k := range vocabulary {
			object[k] = nil
		}
		for k, v := range now {
			object[k] = v
		}
		raw, err := json.Marshal(map[string]any{"metadata": map[string]any{field: object}})
		if err != nil {
			return "", err
		}
		return fmt.Sprintf("%s %v", n.name, now), until(ctx, "change namespace "+n.name, func(ctx context.Context) error {
			_, err := s.core.CoreV1().Namespaces().Patch(ctx, n.name, types.MergePatchType, raw, metav1.PatchOptions{})
			return err
		})
	}
}

func createPod(ctx context.Context, s *soak) (string, error) {
	own := s.own()
	if len(own) == 0 || len(s.pods) > 18 {
		return "", nil
	}
	p := &pod{
		name: fmt.Sprintf("pod-%d", s.number()), namespace: pick(s, own), node: pick(s, nodes),
		labels: s.some(podLabels), annotations: s.some(podAnnotations),
	}
	grace, automount := int64(0), false
	object := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: p.name, Labels: p.labels, Annotations: p.annotations},
		Spec: corev1.PodSpec{
			// There is no kubelet that would end it, and its namespace would hang.
			TerminationGracePeriodSeconds: &grace,
			NodeName:                      p.node, AutomountServiceAccountToken: &automount,
			Containers: []corev1.Container{{Name: "main", Image: "one.test/main"}},
		},
	}
	s.pods[p.name] = p
	return fmt.Sprintf("%s/%s on %s %v %v", p.namespace, p.name, p.node, p.labels, p.annotations), until(ctx, "create pod "+p.name, func(ctx context.Context) error {
		_, err := s.core.CoreV1().Pods(p.namespace).Create(ctx, object, metav1.CreateOptions{}) // once the namespace has its ServiceAccount
		return ignore(err, apierrors.IsAlreadyExists)
	})
}

func (s *soak) pickPod() *pod {
	return s.pods[pick(s, names(s.pods, func(p *pod) bool { return !p.fixed }))]
}

func deletePod(ctx context.Context, s *soak) (string, error) {
	p := s.pickPod()
	if p == nil {
		return "", nil
	}
	delete(s.pods, p.name)
	return p.namespace + "/" + p.name, until(ctx, "delete pod "+p.name, func(ctx context.Context) error {
		return ignore(s.core.CoreV1().Pods(p.namespace).Delete(ctx, p.name, metav1.DeleteOptions{}), apierrors.IsNotFound)
	})
}

func relabelPod(ctx context.Context, s *soak) (string, error) {
	p := s.pickPod()
	if p == nil {
		return "", nil
	}
	p.labels, p.annotations = s.some(podLabels), s.some(podAnnotations)
	patch := []map[string]any{
		{"op": "add", "path": "/metadata/labels", "value": p.labels},
		{"op": "add", "path": "/metadata/annotations", "value": p.annotations},
	}
	return fmt.Sprintf("%s/%s %v %v", p.namespace, p.name, p.labels, p.annotations), s.patchPod(ctx, p, types.JSONPatchType, patch)
}

// runPod has a pod not wait for its Secret any more.
func runPod(ctx context.Context, s *soak) (string, error) {
	p := s.pickPod()
	if p == nil {
		return "", nil
	}
	status := map[string]any{"status": map[string]any{"phase": corev1.PodRunning, "containerStatuses": []any{map[string]any{
		"name": "main", "image": "one.test/main", "imageID": "", "ready": true, "restartCount": 0,
		"state": map[string]any{"running": map[string]any{"startedAt": metav1.Now()}},
	}}}}
	return p.namespace + "/" + p.name, s.patchPod(ctx, p, types.MergePatchType, status, "status")
}

func (s *soak) patchPod(ctx context.Context, p *pod, kind types.PatchType, patch any, subresources ...string) error {
	raw, err := json.Marshal(patch)
	if err != nil {
		return err
	}
	return until(ctx, "change pod "+p.name, func(ctx context.Context) error {
		_, err := s.core.CoreV1().Pods(p.namespace).Patch(ctx, p.name, kind, raw, metav1.PatchOptions{}, subresources...)
		return err
	})
}

func (s *soak) pickSource(states ...sourceState) *source {
	return s.sources[pick(s, names(s.sources, func(source *source) bool { return slices.Contains(states, source.state) }))]
}

func rotateSource(ctx context.Context, s *soak) (string, error) {
	return s.goodSource(ctx, good)
}

func repairSource(ctx context.Context, s *soak) (string, error) {
	return s.goodSource(ctx, broken)
}

func restoreSource(ctx context.Context, s *soak) (string, error) {
	return s.goodSource(ctx, missing)
}

// goodSource gives a source in this state a new version.
func (s *soak) goodSource(ctx context.Context, state sourceState) (string, error) {
	source := s.pickSource(state)
	if source == nil {
		return "", nil
	}
	source.state, source.now = good, s.number()
	source.recent = append(source.recent, source.now)
	passwords, auths := map[string]string{}, map[string]any{}
	for range 1 + s.random.IntN(3) {
		registry := pick(s, registries)
		passwords[registry] = fmt.Sprintf("%s%s-%d", canary, source.name, source.now)
		auths[registry] = map[string]any{"username": userName, "password": passwords[registry]}
	}
	source.config[source.now] = passwords
	raw, err := json.Marshal(map[string]any{"auths": auths})
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%s version %d %v", source.name, source.now, slices.Sorted(maps.Keys(passwords))), s.writeSource(ctx, source.name, raw)
}

// breakSource leaves a source that no kubelet could use.
func breakSource(ctx context.Context, s *soak) (string, error) {
	source := s.pickSource(good)
	if source == nil {
		return "", nil
	}
	source.state = broken
	return source.name, s.writeSource(ctx, source.name, []byte(`{"auths":{"one.test":{"auth":"this is not base64"}}}`))
}

func deleteSource(ctx context.Context, s *soak) (string, error) {
	source := s.pickSource(good, broken)
	if source == nil {
		return "", nil
	}
	source.state, source.wasMissing = missing, true
	return source.name, until(ctx, "delete source "+source.name, func(ctx context.Context) error {
		return ignore(s.core.CoreV1().Secrets(imps.SourceNamespace).Delete(ctx, source.name, metav1.DeleteOptions{}), apierrors.IsNotFound)
	})
}

func (s *soak) writeSource(ctx context.Context, name string, config []byte) error {
	secret := &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: name}, Type: corev1.SecretTypeDockerConfigJson,
		Data: map[string][]byte{corev1.DockerConfigJsonKey: config},
	}
	return until(ctx, "write source "+name, func(ctx context.Context) error {
		_, err := s.core.CoreV1().Secrets(imps.SourceNamespace).Update(ctx, secret, metav1.UpdateOptions{})
		if apierrors.IsNotFound(err) {
			_, err = s.core.CoreV1().Secrets(imps.SourceNamespace).Create(ctx, secret, metav1.CreateOptions{})
		}
		return err
	})
}

// editTarget has a user patch a target, if it is there, and tells of it.
func editTarget(patch string, tell func(*soak, key, types.UID)) func(context.Context, *soak) (string, error) {
	return func(ctx context.Context, s *soak) (string, error) {
		wanted, claims := s.wanted()
		k := pick(s, wanted)
		if k.name == "" {
			return "", nil
		}
		return s.patchTarget(ctx, k, strings.ReplaceAll(patch, "UID", string(claims[k][0].uid)), tell)
	}
}

func (s *soak) patchTarget(ctx context.Context, k key, patch string, tell func(*soak, key, types.UID)) (string, error) {
	var edited *corev1.Secret
	err := until(ctx, "edit Secret "+k.String(), func(ctx context.Context) (err error) {
		edited, err = s.core.CoreV1().Secrets(k.namespace).Patch(ctx, k.name, types.MergePatchType, []byte(patch), metav1.PatchOptions{FieldManager: "a-user"})
		return err
	}, apierrors.IsNotFound)
	if apierrors.IsNotFound(err) {
		return k.String() + ", which is not there", nil
	}
	if err == nil && tell != nil {
		tell(s, k, edited.UID)
	}
	return k.String(), err
}

// edited is what a user puts into a label of imps's.
const edited = "edited-by-a-user"

func editTargetLabel(ctx context.Context, s *soak) (string, error) {
	wanted, claims := s.wanted()
	k := pick(s, wanted)
	label := impsync.LabelOwnerUID
	if k.name != "" {
		label = pick(s, append(slices.Sorted(maps.Keys(claims[k][0].spec.labels)), label))
	}
	if k.name == "" {
		return "", nil
	}
	tell := mayStay
	if label != impsync.LabelOwnerUID {
		tell = nil
	}
	return s.patchTarget(ctx, k, fmt.Sprintf(`{"metadata":{"labels":{%q:%q}}}`, label, edited), tell)
}

// mayStay notes that a Secret lacks what tells whose it is: where nothing selects it before
// imps repairs it, it stays.
func mayStay(s *soak, _ key, uid types.UID) { s.left[uid] = true }

func deleteTarget(ctx context.Context, s *soak) (string, error) {
	wanted, _ := s.wanted()
	k := pick(s, wanted)
	if k.name == "" {
		return "", nil
	}
	delete(s.keep, k)
	return k.String(), s.deleteSecret(ctx, k)
}

func (s *soak) deleteSecret(ctx context.Context, k key) error {
	return until(ctx, "delete Secret "+k.String(), func(ctx context.Context) error {
		return ignore(s.core.CoreV1().Secrets(k.namespace).Delete(ctx, k.name, metav1.DeleteOptions{}), apierrors.IsNotFound)
	})
}

// takeTargetOver makes a target a user's own: a foreign one from then on.
func takeTargetOver(ctx context.Context, s *soak) (string, error) {
	wanted, _ := s.wanted()
	k := pick(s, wanted)
	if k.name == "" || len(s.foreign) > 3 {
		return "", nil
	}
	patch := fmt.Sprintf(`{"metadata":{"labels":{%q:null},"ownerReferences":null},"data":{"mine":"eA=="}}`, impsync.LabelOwnerUID)
	return k.String(), until(ctx, "take Secret "+k.String()+" over", func(ctx context.Context) error {
		// Where it is not there yet, it comes at the latest when the faults are over.
		mine, err := s.core.CoreV1().Secrets(k.namespace).Patch(ctx, k.name, types.MergePatchType, []byte(patch), metav1.PatchOptions{FieldManager: "a-user"})
		if apierrors.IsNotFound(err) {
			mine, err = s.core.CoreV1().Secrets(k.namespace).Create(ctx, foreignSecret(k, 0), metav1.CreateOptions{})
		}
		if err == nil {
			s.foreign[k] = foreign{mine.UID, mine.ResourceVersion}
		}
		return err
	})
}

// foreignSecret is somebody else's Secret, in one of several forms.
func foreignSecret(k key, form int) *corev1.Secret {
	yes := true
	secret := &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: k.name}, Type: corev1.SecretTypeDockerConfigJson,
		Data: map[string][]byte{corev1.DockerConfigJsonKey: []byte(`{"auths":{"mine.test":{"auth":"` + base64.StdEncoding.EncodeToString([]byte("me:mine")) + `"}}}`)},
	}
	switch form {
	case 1:
		secret.Type, secret.Data = corev1.SecretTypeOpaque, map[string][]byte{"mine": []byte("x")}
	case 2:
		secret.Labels = map[string]string{impsync.LabelOwnerUID: "copied-by-a-user"}
	case 3:
		secret.Immutable = &yes
	}
	return secret
}

func putForeign(ctx context.Context, s *soak) (string, error) {
	wanted, _ := s.wanted()
	k, form := pick(s, wanted), s.random.IntN(4)
	if anywhere := (key{pick(s, s.own()), pick(s, targets)}); k.name == "" || s.random.IntN(3) == 0 {
		k = anywhere
	}
	if _, occupied := s.foreign[k]; occupied || k.namespace == "" || len(s.foreign) > 3 {
		return "", nil
	}
	number := fmt.Sprint(s.number())
	delete(s.keep, k)
	secrets := s.core.CoreV1().Secrets(k.namespace)
	return fmt.Sprintf("%s form %d", k, form), until(ctx, "put a foreign Secret at "+k.String(), func(ctx context.Context) error {
		var err error
		for range 50 { // imps is quick to come back
			if err = ignore(secrets.Delete(ctx, k.name, metav1.DeleteOptions{}), apierrors.IsNotFound); err != nil {
				return err
			}
			secret := foreignSecret(k, form)
			secret.Annotations = map[string]string{"soak.test/number": number}
			var mine *corev1.Secret
			if mine, err = secrets.Create(ctx, secret, metav1.CreateOptions{FieldManager: "a-user"}); err == nil {
				s.foreign[k] = foreign{mine.UID, mine.ResourceVersion}
				return nil
			}
			if !apierrors.IsAlreadyExists(err) {
				return err
			}
		}
		return err
	})
}

// untouched returns an error where a foreign Secret is not as it was left.
func (s *soak) untouched(ctx context.Context, k key, f foreign) error {
	var there *corev1.Secret
	err := until(ctx, "read foreign Secret "+k.String(), func(ctx context.Context) (err error) {
		there, err = s.core.CoreV1().Secrets(k.namespace).Get(ctx, k.name, metav1.GetOptions{})
		return err
	}, apierrors.IsNotFound)
	if err != nil {
		return fmt.Errorf("foreign Secret %s: %w", k, err)
	}
	if there.UID != f.uid || there.ResourceVersion != f.resourceVersion {
		return fmt.Errorf("foreign Secret %s was changed: %s at %s is %s at %s", k, f.uid, f.resourceVersion, there.UID, there.ResourceVersion)
	}
	return nil
}

func removeForeign(ctx context.Context, s *soak) (string, error) {
	occupied := slices.SortedFunc(maps.Keys(s.foreign), compareKeys)
	k := pick(s, occupied)
	if k.name == "" {
		return "", nil
	}
	f := s.foreign[k]
	if err := s.untouched(ctx, k, f); err != nil {
		return "", err
	}
	delete(s.foreign, k)
	return k.String(), until(ctx, "take foreign Secret "+k.String()+" away", func(ctx context.Context) error {
		err := s.core.CoreV1().Secrets(k.namespace).Delete(ctx, k.name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &f.uid}})
		return ignore(err, apierrors.IsNotFound, apierrors.IsConflict)
	})
}

// ignore returns no error where one of these says that it is none.
func ignore(err error, none ...func(error) bool) error {
	if err != nil && slices.ContainsFunc(none, func(is func(error) bool) bool { return is(err) }) {
		return nil
	}
	return err
}
